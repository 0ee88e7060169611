"""Two ranks write a checkpoint beside their callers: what goes wrong on one of them, all learn."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

from ranks import run_ranks

FAILURES: list[type[Exception] | None] = [OSError, None, ValueError]


class _State:
    step = 7

    def write(self, path: Path, _sums: Any) -> None:
        (path / "train_state.json").touch()


class _Backbone:
    """Written once `may_write`; rank 1 fails with `failure`."""

    def __init__(self, rank: int, failure: type[Exception] | None) -> None:
        self.rank, self.failure = rank, failure
        self.may_write = threading.Event()

    def write(self, folder: Path, _sums: Any, _group: Any) -> None:
        assert self.may_write.wait(60)
        if self.rank == 1 and self.failure is not None:
            raise self.failure("the disk of rank 1 is full\nand more")


def _write_each(rank: int, world_size: int, folder: Path) -> list[Any]:
    """One checkpoint for each of FAILURES: what `finish` raised, what was saved, and whether it was complete before."""
    from types import SimpleNamespace

    from engram_megatron.training.checkpoint_writer import CheckpointWriter, Snapshot
    from engram_megatron.training.save_target import RunCheckpoint

    ranks: Any = SimpleNamespace(world_size=world_size, is_first=rank == 0)
    writer = CheckpointWriter(ranks, 60)
    seen = []
    for number, failure in enumerate(FAILURES):
        backbone: Any = _Backbone(rank, failure)
        path, state = folder / f"step_{number}", _State()
        target = RunCheckpoint(path, ranks, lambda: (folder / "cleaned_up").touch())
        snapshot = Snapshot(started=time.perf_counter(), target=target, state=state, backbone=backbone, tables=None)  # type: ignore[arg-type]
        writer.write(snapshot, wait=False)
        early = writer.has_failed, (path / "COMPLETE").exists(), writer.take_saved()
        backbone.may_write.set()
        raised: Any = None
        try:
            writer.finish()
        except Exception as error:
            raised = type(error).__name__, str(error)
        writer.finish()  # told once
        seen.append((early, raised, [(saved.step, saved.target.path.name) for saved in writer.take_saved()]))
    writer.close()
    return seen


def test_failure_of_one_rank_is_everybodys_and_the_next_checkpoint_is_written(tmp_path: Path) -> None:
    first, second = run_ranks(_write_each, 2, tmp_path)
    nothing_yet = (False, False, [])
    assert [early for early, _, _ in first + second] == [nothing_yet] * 6
    assert first[0] == second[0]
    kind, message = first[0][1]
    assert kind == "SaveError"
    assert f"checkpoint {tmp_path}/step_0 could not be written (and more); " in message
    assert [(raised, saved) for _, raised, saved in (first[1], second[1])] == [(None, [(7, "step_1")])] * 2
    assert first[2][1][0] == "SaveError"
    assert second[2][1] == ("ValueError", "the disk of rank 1 is full\nand more")
    assert [path.parent.name for path in tmp_path.glob("*/COMPLETE")] == ["step_1"]
    assert (tmp_path / "cleaned_up").exists()
