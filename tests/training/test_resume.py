"""A run that is broken off and resumed is the run that was never broken off, bit for bit, on two ranks."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_run import Start, backbone, finished_weights, metrics, run_starts, tables, tiny_config, train_losses

from engram_megatron.overrides import apply_overrides

pytestmark = pytest.mark.usefixtures("runs")
# So large that a step updates its own rows only, and leaves others behind.
LARGE_TABLES = ("engram.rows_per_head=40009", "tables.block_rows=8192")


@pytest.fixture(scope="module")
def runs(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    """Six steps at once in `straight`; three, then three more in `broken` (free keys changed); and `started` from the
    weights of `straight` with another learning rate, for one step. Returns (folder, summaries of rank 0)."""
    folder = tmp_path_factory.mktemp("runs")
    straight, broken = (
        tiny_config(tiny_corpus, folder / name, *LARGE_TABLES, "checkpoint.every_steps=0")
        for name in ("straight", "broken")
    )
    resumed = tiny_config(
        tiny_corpus, folder / "broken", *LARGE_TABLES, "checkpoint.every_steps=4", "checkpoint.keep_last=1"
    )
    init = f"checkpoint.init_from={folder / 'straight/checkpoints/step_00000006'}"
    started = tiny_config(
        tiny_corpus, folder / "started", *LARGE_TABLES, init, "optimizer.learning_rate=1e-4", "checkpoint.every_steps=1"
    )
    starts = [Start(straight), Start(broken, stop_after=3), Start(resumed, resume=True), Start(started, stop_after=0)]
    return folder, run_starts(starts)[0]


def test_stop_in_the_middle_saves_that_step(runs: tuple[Path, list[Any]]) -> None:
    _, (_, stopped, resumed, _) = runs
    assert (stopped.step, stopped.stopped_by, stopped.checkpoint.name) == (3, "the test", "step_00000003")
    assert (resumed.step, resumed.stopped_by, resumed.tokens_seen) == (6, None, 2 * stopped.tokens_seen)


def test_losses_are_those_of_the_unbroken_run(runs: tuple[Path, list[Any]]) -> None:
    folder, (straight, _, resumed, _) = runs
    expected = train_losses(folder / "straight")
    assert list(expected) == [1, 2, 3, 4, 5, 6]
    assert len(set(expected.values())) == 6
    assert train_losses(folder / "broken") == expected
    assert resumed.last_validation_loss == straight.last_validation_loss


def test_weights_and_optimizer_state_are_those_of_the_unbroken_run(runs: tuple[Path, list[Any]]) -> None:
    folder, _ = runs
    expected, found = (backbone(folder / name / "checkpoints/step_00000006") for name in ("straight", "broken"))
    assert found.keys() == expected.keys()
    assert any(name.startswith("optimizer.") for name in found)
    different = [name for name in expected if not torch.equal(expected[name], found[name])]
    assert different == []


def test_tables_are_those_of_the_unbroken_run(runs: tuple[Path, list[Any]]) -> None:
    folder, _ = runs
    expected, found = (tables(folder / name / "checkpoints/step_00000006") for name in ("straight", "broken"))
    assert (expected["exp_avg"] != 0).any()
    for name in ("weight", "exp_avg", "exp_avg_sq", "last_step"):
        np.testing.assert_array_equal(found[name], expected[name], strict=True)
    assert found["step_count"] == expected["step_count"] == 6


def test_no_step_is_logged_twice(runs: tuple[Path, list[Any]]) -> None:
    folder, _ = runs
    lines = metrics(folder / "broken")
    assert [line["step"] for line in lines if "checkpoint/seconds" in line] == [3, 4, 6]
    keys = [(line["step"], "train/loss" in line) for line in lines if "checkpoint/seconds" not in line]
    assert keys == [
        (0, False),
        (1, True),
        (2, True),
        (3, True),
        (3, False),
        (4, True),
        (5, True),
        (6, True),
        (6, False),
    ]


def test_old_checkpoints_are_removed_after_a_resume_too(runs: tuple[Path, list[Any]]) -> None:
    folder, _ = runs
    assert [path.name for path in (folder / "broken/checkpoints").iterdir()] == ["step_00000006"]


def test_init_from_takes_weights_and_tables_and_nothing_else(runs: tuple[Path, list[Any]]) -> None:
    folder, (*_, started) = runs
    assert (started.step, started.tokens_seen) == (0, 0)
    before = folder / "straight/checkpoints/step_00000006"
    after = started.checkpoint
    expected, found = backbone(before), backbone(after)
    weights = [name for name in expected if not name.startswith("optimizer.") and name != "num_steps"]
    assert [name for name in weights if not torch.equal(expected[name], found[name])] == []
    moments = [name for name in found if name.startswith("optimizer.") and ".master." not in name]
    assert moments
    assert [name for name in moments if torch.count_nonzero(found[name])] == []
    rows, started_rows = tables(before), tables(after)
    np.testing.assert_array_equal(started_rows["weight"], finished_weights(before))
    assert (started_rows["weight"] != rows["weight"]).any(), "no row was behind"
    assert not started_rows["exp_avg"].any()
    assert not started_rows["exp_avg_sq"].any()
    assert started_rows["step_count"] == 0


def test_tables_may_move_to_a_disk_and_back_at_a_resume(
    runs: tuple[Path, list[Any]], tiny_corpus: Path, disk: Path, tmp_path: Path
) -> None:
    """Two steps on a disk, with less than twenty rows of a rank in memory, two in memory, two on a disk again."""
    host = tiny_config(tiny_corpus, tmp_path / "run", *LARGE_TABLES, "checkpoint.every_steps=0")
    nvme = ["tables.placement=nvme", f"tables.nvme_dir={disk}", "tables.hot_fraction=0.0002"]
    starts = [
        Start(apply_overrides(host, nvme), stop_after=2),
        Start(host, resume=True, stop_after=2),
        Start(apply_overrides(host, nvme), resume=True),
    ]
    summaries = run_starts(starts)[0]
    assert [summary.step for summary in summaries] == [2, 4, 6]
    expected = runs[0] / "straight"
    assert train_losses(tmp_path / "run") == train_losses(expected)
    assert summaries[-1].last_validation_loss == runs[1][0].last_validation_loss
    ours, theirs = (tables(folder / "checkpoints/step_00000006") for folder in (tmp_path / "run", expected))
    for name in ("weight", "exp_avg", "exp_avg_sq", "last_step"):
        np.testing.assert_array_equal(ours[name], theirs[name], strict=True)
    assert list(disk.iterdir()) == []


def test_incomplete_checkpoint_is_ignored_and_replaced(tiny_corpus: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny_corpus, tmp_path / "run", "checkpoint.every_steps=2", "checkpoint.keep_last=2")
    first = run_starts([Start(config)])[0][0]
    losses = train_losses(tmp_path / "run")
    newest = tmp_path / "run/checkpoints/step_00000006"
    (newest / "COMPLETE").unlink()
    shutil.rmtree(newest / "tables.zarr/exp_avg")
    (newest / "left_by_the_killed_run").touch()
    again = run_starts([Start(config, resume=True)])[0][0]
    assert again.last_validation_loss == first.last_validation_loss
    assert train_losses(tmp_path / "run") == losses
    assert not (newest / "left_by_the_killed_run").exists()
    assert [path.name for path in sorted((tmp_path / "run/checkpoints").iterdir())] == [
        "step_00000004",
        "step_00000006",
    ]
