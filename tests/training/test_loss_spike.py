"""Which losses are a spike, and which checkpoint a run goes back to."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from engram_megatron.config_spikes import SpikeConfig
from engram_megatron.errors import UsageError
from engram_megatron.training.loss_spike import LossSpikeError, LossWatch, Spike, checkpoint_before, find_spike
from engram_megatron.training.rollback_log import SKIPPED_FILE, read_rollbacks

CONFIG = SpikeConfig(max_rollbacks=1, window_steps=32, deviations=6.0, steps_in_a_row=3)


def losses(count: int, *last: float) -> list[float]:
    """Of a run that learns: from 4, with a noise of 0.02."""
    chance = random.Random(7)
    return [4 - step / 1000 + chance.gauss(0, 0.02) for step in range(count)] + list(last)


def test_losses_that_stay_high_are_a_spike() -> None:
    spike = find_spike(losses(32, 4.3, 4.5, 4.4), 35, CONFIG)
    assert spike is not None
    assert (spike.first_step, spike.step) == (33, 35)
    assert spike.reason.startswith("loss 4.3000 in step 33, 4.4000 in step 35: over 4.0936, 6 deviations")


@pytest.mark.parametrize(
    ("count", "last"),
    [
        (32, (4.5, 4.0, 4.5)),  # it came down
        (32, (4.01, 4.01, 4.01)),  # within the noise
        (31, (9.0, 9.0, 9.0)),  # nobody knows yet what is usual
        (32, (4.5, 4.5)),
        (32, (1.0, 1.0, 1.0)),
    ],
)
def test_other_losses_are_none(count: int, last: tuple[float, ...]) -> None:
    assert find_spike(losses(count, *last), count + len(last), CONFIG) is None


def test_losses_of_a_beginning_run_are_none() -> None:
    watch = LossWatch(CONFIG, [])
    for step in range(1, 500):
        watch.add(step, 10 * step**-0.3 + 0.1 * (step % 7 == 0))


def test_few_bad_steps_do_not_hide_the_next_ones() -> None:
    found = losses(32, 9.0, 9.0, 4.0, 9.0, 9.0, 4.0)
    assert find_spike([*found, 4.5, 4.5, 4.5], 41, CONFIG) is not None


@pytest.mark.parametrize("broken_off_after", range(1, 35))
def test_run_decides_the_same_wherever_it_was_broken_off(broken_off_after: int) -> None:
    whole = losses(40, 4.5, 4.5, 4.5)
    watch = LossWatch(CONFIG, [])
    for step in range(1, broken_off_after + 1):
        watch.add(step, whole[step - 1])
    resumed = LossWatch(CONFIG, watch.losses)
    for step in range(broken_off_after + 1, 43):
        resumed.add(step, whole[step - 1])
    with pytest.raises(LossSpikeError) as raised:
        resumed.add(43, whole[42])
    assert (raised.value.spike.first_step, raised.value.spike.step) == (41, 43)


def test_nothing_is_kept_or_told_without_the_policy() -> None:
    watch = LossWatch(SpikeConfig(window_steps=2, steps_in_a_row=1), [1.0, 2.0])
    for step in range(3, 9):
        watch.add(step, 10.0**step)
    assert watch.losses == []


def test_policy_without_a_checkpoint_to_go_back_to_is_refused() -> None:
    SpikeConfig(max_rollbacks=1).validate(1000, 3)
    SpikeConfig(max_rollbacks=1).validate(10, 0)
    SpikeConfig().validate(0, 1)
    with pytest.raises(UsageError, match=r"reach back 20; set checkpoint.keep_last to 12 or more \(0: all\)"):
        SpikeConfig(max_rollbacks=1).validate(10, 3)
    with pytest.raises(UsageError, match=r"checkpoint.every_steps"):
        SpikeConfig(max_rollbacks=1).validate(0, 0)


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ([100, 200, 300, 400], 200),
        ([100, 299, 300, 400], 299),  # its margin is just there: steps 300 to 399 lie between
        ([320, 340, 400], 320),  # none is as old as the margin: the oldest
        ([400, 420], None),  # all have seen the spike
        ([], 0),
    ],
)
def test_newest_checkpoint_from_before_the_margin_is_taken(steps: list[int], expected: int | None) -> None:
    assert checkpoint_before(steps, Spike(400, 405, ""), margin_steps=100) == expected


def test_damaged_log_is_told_in_a_line(tmp_path: Path) -> None:
    assert read_rollbacks(tmp_path) == []
    (tmp_path / SKIPPED_FILE).write_text('{"time": 1')
    with pytest.raises(UsageError, match=r"skipped_windows.jsonl is damaged .*; restore it"):
        read_rollbacks(tmp_path)
