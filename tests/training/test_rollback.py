"""A run whose loss really spikes goes back, skips the samples around the spike, and ends; and each other sample of the
corpus is trained exactly once, over crashes and layouts, by what the model was fed."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from recorded_run import read_records, record
from spiky_corpus import build_spiky_corpus, samples_by_content
from tiny_run import Start, run_starts, tables, tiny_config, train_losses

from engram_checkpoints.train_state import TrainState
from engram_megatron.training.rollback_log import read_rollbacks

SAMPLES, STEPS = 96, 20  # all of the corpus but four batches of four that are skipped: one epoch
SPIKY_STEPS = (13, 14)  # 0-based: a spike is noticed in step 15
RUN = (
    *(f"training.num_steps={STEPS}", "checkpoint.every_steps=4", "checkpoint.keep_last=0"),
    *("spikes.window_steps=8", "spikes.deviations=1.5", "spikes.steps_in_a_row=2", "spikes.margin_steps=2"),
    *("spikes.skip_steps=3", "spikes.max_rollbacks=1"),
)


@pytest.fixture(scope="module")
def corpus(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_spiky_corpus(tiny_corpus, tmp_path_factory.mktemp("spiky") / "corpus", SAMPLES, SPIKY_STEPS)


def _checkpoints(run_dir: Path) -> list[str]:
    return sorted(str(path.relative_to(run_dir)) for path in run_dir.glob("checkpoints/**/step_*"))


@pytest.fixture(scope="module")
def rolled_back(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, float], list[Any]]:
    """(run folder as the spike left it, losses until then, outcomes of both ranks)."""
    run_dir = tmp_path_factory.mktemp("rolled_back") / "run"
    outcomes = run_starts([Start(tiny_config(corpus, run_dir, *RUN))])
    return run_dir, train_losses(run_dir), [outcome for (outcome,) in outcomes]


def test_spike_ends_a_run_with_a_line_and_sets_later_checkpoints_aside(
    rolled_back: tuple[Path, dict[int, float], list[Any]],
) -> None:
    run_dir, losses, (first, second) = rolled_back
    assert first == second
    kind, line = first
    assert kind == "RolledBackError"
    assert "rolled back to step 8, 4 batches skipped after step 11 (samples 44 to 59 of the order): loss 7." in line
    assert line.endswith("continue with --resume")
    assert sorted(losses) == list(range(1, 16))
    assert _checkpoints(run_dir) == [
        *("checkpoints/rolled_back_001/step_00000012", "checkpoints/step_00000004", "checkpoints/step_00000008"),
    ]
    (rollback,) = read_rollbacks(run_dir)
    assert (rollback.step, rollback.checkpoint_step, rollback.window_step, rollback.batches) == (15, 8, 11, 4)
    assert (rollback.first_sample, rollback.stop_sample) == (44, 60)


def test_resume_skips_the_window_and_is_the_run_that_never_read_it(
    rolled_back: tuple[Path, dict[int, float], list[Any]], corpus: Path, tmp_path: Path
) -> None:
    """In `resumed`, a kill came before the later checkpoint was set aside; `straight` has the log from its start on."""
    run_dir, losses, _ = rolled_back
    for name in ("resumed", "straight"):
        shutil.copytree(run_dir, tmp_path / name)
    aside, place = (f"resumed/checkpoints/{name}" for name in ("rolled_back_001/step_00000012", "step_00000012"))
    (tmp_path / aside).rename(tmp_path / place)
    (tmp_path / aside).parent.rmdir()
    shutil.rmtree(tmp_path / "straight/checkpoints")
    starts = [Start(tiny_config(corpus, tmp_path / name, *RUN), resume=True) for name in ("resumed", "straight")]
    summaries = run_starts(starts)[0]
    assert [summary.step for summary in summaries] == [STEPS, STEPS], summaries
    assert (tmp_path / aside).is_dir()
    found = train_losses(tmp_path / "resumed")
    assert list(found) == list(range(1, STEPS + 1)), "one curve"
    assert {step: found[step] for step in range(1, 12)} == {step: losses[step] for step in range(1, 12)}
    assert max(found[step] for step in range(12, STEPS + 1)) < 6.8, "the spike came back"
    assert found == train_losses(tmp_path / "straight")
    ours, theirs = (tables(summary.checkpoint) for summary in summaries)
    for name, values in theirs.items():
        np.testing.assert_array_equal(ours[name], values, err_msg=name)
    for summary in summaries:
        state = TrainState.read(summary.checkpoint)
        assert state.skipped_samples == [[44, 60]]
        assert state.recent_losses == [found[step] for step in range(11, STEPS + 1)]
    # A checkpoint that was copied elsewhere knows by itself.
    saved = "checkpoints/step_00000016"
    shutil.copytree(tmp_path / "resumed" / saved, tmp_path / "copied" / saved)
    run_starts([Start(tiny_config(corpus, tmp_path / "copied", *RUN), resume=True)])
    assert train_losses(tmp_path / "copied") == {step: found[step] for step in range(17, STEPS + 1)}


def test_saves_on_the_nodes_that_have_read_what_is_skipped_are_not_taken(corpus: Path, tmp_path: Path) -> None:
    local = (f"checkpoint.local_dir={tmp_path}/local", "checkpoint.local_every_steps=1", "tables.ranks_per_node=1")
    config = tiny_config(corpus, tmp_path / "run", *RUN, *local, "checkpoint.asynchronous=false")
    outcomes = run_starts([Start(config)])[0]
    assert outcomes[0][0] == "RolledBackError"
    saves = sorted(path.name.partition("-")[0] for path in tmp_path.glob("local/*/step_*"))
    assert saves == ["step_00000013", "step_00000014"]
    (summary,) = run_starts([Start(config, resume=True, output=tmp_path / "output.txt")])[0]
    assert summary.step == STEPS, summary
    assert "no whole snapshot on the nodes' disks is newer" in (tmp_path / "output.txt").read_text()
    assert list(train_losses(tmp_path / "run")) == list(range(1, STEPS + 1))


def test_loss_that_is_never_finite_is_given_up(corpus: Path, tmp_path: Path) -> None:
    wrong = ("optimizer.learning_rate=1e30", "optimizer.warmup_steps=1", *RUN)
    config = tiny_config(corpus, tmp_path / "run", *wrong)
    (kind, told), (last_kind, last_told) = run_starts([Start(config), Start(config, resume=True)])[0]
    assert kind == "RolledBackError"
    assert "rolled back to step 0, " in told
    assert "is nan" in told
    assert last_kind == "SpikesNotCuredError"
    assert "is nan" in last_told
    assert "has rolled back 1 times already" in last_told
    assert "raise spikes.max_rollbacks = 1 and continue with --resume" in last_told
    assert len(read_rollbacks(tmp_path / "run")) == 1


def test_each_sample_is_trained_once_over_crashes_and_layouts_but_for_those_that_are_skipped(
    corpus: Path, tmp_path: Path
) -> None:
    """Two ranks that die in step 6, one rank that rolls back, two tensor-parallel ranks: an epoch."""
    starts = [(2, (), 6), (1, ("parallel.expert=1",), None), (2, ("parallel.expert=1", "parallel.tensor=2"), None)]
    folders = [tmp_path / f"start_{number}" for number in range(len(starts))]
    ends = []
    for folder, (ranks, options, die_in_step) in zip(folders, starts, strict=True):
        folder.mkdir()
        config = tiny_config(corpus, tmp_path / "run", *RUN, *options)
        start = Start(config, resume=folder != folders[0], before=partial(record, folder, die_in_step))
        ends += run_starts([start], ranks)[0]
    assert [kind for kind, *_ in ends[:2]] == ["RuntimeError", "RolledBackError"]
    assert ends[2].step == STEPS
    trained = read_records(folders, samples_by_content(corpus))
    survived = [sample for step in range(STEPS) for sample in trained.surviving[step]]
    assert len(trained.surviving) == STEPS
    assert len(survived) == len(set(survived)) == STEPS * 4, "no sample is trained twice"
    (rollback,) = read_rollbacks(tmp_path / "run")
    skipped = set(range(SAMPLES)) - set(survived)
    assert len(skipped) == rollback.stop_sample - rollback.first_sample == 16
    assert skipped <= trained.all, "what is skipped is what was read before and during the spike"
