"""Writes one checkpoint at a time in a thread of its own, beside training: in steps that all ranks take or none."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import numba
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from engram_checkpoints.backbone import BackboneSnapshot
from engram_checkpoints.checkpoint_files import COMPLETE, FileSum, FileSums, complete
from engram_checkpoints.table_snapshot import TableSnapshot
from engram_checkpoints.table_writer import TableWriter
from engram_checkpoints.train_state import TrainState
from engram_megatron.training.parallel import Ranks

BACKBONE, TABLES = "backbone", "tables.zarr"
Result = TypeVar("Result")


class SaveError(RuntimeError):
    """A checkpoint could not be written; the last complete one stands."""


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What a rank writes of a checkpoint, as it was when training went on. `started`: when that was asked for, of
    `time.perf_counter`."""

    started: float
    path: Path
    state: TrainState
    backbone: BackboneSnapshot
    tables: TableSnapshot | None

    @property
    def seconds(self) -> float:
        """Since it was asked for."""
        return time.perf_counter() - self.started

    @property
    def update_stall_s(self) -> float:
        """What updates of the tables have waited for it."""
        return 0.0 if self.tables is None else self.tables.stall_s


@dataclass(frozen=True, kw_only=True)
class SavedCheckpoint:
    """A complete checkpoint. `seconds` from the call of `save` to its end, of which training waited `stall_s`, in that
    call and in updates of the tables, on the rank that waited longest."""

    path: Path
    step: int
    seconds: float
    stall_s: float


class CheckpointWriter:
    """At most one checkpoint is in flight. The thread's collectives run on a gloo group of its own. All ranks call the
    same methods in the same order, but for `has_failed` and `take_saved`."""

    def __init__(self, ranks: Ranks, timeout_s: int, clean_up: Callable[[], None]) -> None:
        """Collective. Rank 0 calls `clean_up` once a checkpoint is complete."""
        self.ranks = ranks
        self.clean_up = clean_up
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
        # One thread of numba's: the others are training's.
        self._executor = ThreadPoolExecutor(
            1, thread_name_prefix="checkpoint", initializer=numba.set_num_threads, initargs=(1,)
        )
        self._in_flight: Future[SavedCheckpoint] | None = None
        self._saved: list[SavedCheckpoint] = []

    def write(self, snapshot: Snapshot, *, wait: bool) -> None:
        """Write a checkpoint beside the caller, or while it waits, and raise then as `finish` does."""
        assert self._in_flight is None, "one checkpoint at a time"
        stall_s = None if wait else snapshot.seconds
        self._in_flight = self._executor.submit(self._write, snapshot, stall_s)
        if wait:
            self.finish()

    @property
    def has_failed(self) -> bool:
        """Whether `finish` will raise, as far as this rank knows by now."""
        return self._in_flight is not None and self._in_flight.done() and self._in_flight.exception() is not None

    def finish(self) -> None:
        """Wait for the checkpoint in flight, if there is one.

        Raises `SaveError` on all ranks, once, where one of them could not write.
        """
        if self._in_flight is not None:
            future, self._in_flight = self._in_flight, None
            self._saved.append(future.result())

    def take_saved(self) -> list[SavedCheckpoint]:
        """Checkpoints that were completed since the last call."""
        if self._in_flight is not None and self._in_flight.done() and not self.has_failed:
            self.finish()
        saved, self._saved = self._saved, []
        return saved

    def close(self) -> None:
        """End the thread."""
        self._executor.shutdown()

    def _write(self, snapshot: Snapshot, stall_s: float | None) -> SavedCheckpoint:
        """In the thread. `stall_s`: what training has waited so far; None: it waits for the end."""
        path, sums = snapshot.path, FileSums(snapshot.path)
        try:
            self._together(path, lambda: self._begin(snapshot, sums))
            self._together(path, lambda: _write_tables(snapshot, sums))
        finally:
            if snapshot.tables is not None:
                snapshot.tables.close()
        self._together(path, lambda: snapshot.backbone.write(path / BACKBONE, sums, self._group))
        # What COMPLETE vouches for must be on disk before it is.
        of_ranks = self._together(path, sums.flush)
        self._together(path, lambda: self._complete(path, {name: s for files in of_ranks for name, s in files.items()}))
        waited_s = snapshot.seconds if stall_s is None else stall_s + snapshot.update_stall_s
        waits = self._together(path, lambda: waited_s)
        return SavedCheckpoint(path=path, step=snapshot.state.step, seconds=snapshot.seconds, stall_s=max(waits))

    def _begin(self, snapshot: Snapshot, sums: FileSums) -> None:
        """The folder, with what one rank writes of it."""
        path = snapshot.path
        if not self.ranks.is_first:
            return
        if path.exists():  # what a killed run left half-written
            (path / COMPLETE).unlink(missing_ok=True)
            shutil.rmtree(path)
        path.mkdir(parents=True)
        snapshot.state.write(path, sums)
        if snapshot.tables is not None:
            snapshot.tables.create(path / TABLES, sums)

    def _complete(self, path: Path, sums: dict[str, FileSum]) -> None:
        if self.ranks.is_first:
            complete(path, sums)
            self.clean_up()

    def _together(self, path: Path, action: Callable[[], Result]) -> list[Result]:
        """What `action` gives on each rank, once it is done on all. If it fails anywhere, it has failed on all: nobody
        waits for a rank that gave up."""
        result, failure = None, None
        try:
            result = action()
        except (Exception, CheckpointException) as error:  # torch wraps its writers' errors
            failure = error
        outcomes: list[Any] = [None] * self.ranks.world_size
        told = None if failure is None else _reason(path, failure)
        dist.all_gather_object(outcomes, (told, result), group=self._group)
        if failure is not None and not isinstance(failure, OSError | CheckpointException):
            raise failure  # ours, to be told with its traceback
        for problem, _ in outcomes:
            if problem is not None:
                raise SaveError(problem) from failure
        return [of_rank for _, of_rank in outcomes]


def _write_tables(snapshot: Snapshot, sums: FileSums) -> None:
    if snapshot.tables is not None:
        with TableWriter(snapshot.path / TABLES, snapshot.tables.description, sums) as writer:
            snapshot.tables.write(writer)


def _reason(path: Path, error: BaseException) -> str:
    """In one line, with the room that this rank sees."""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
    existing = next(folder for folder in path.absolute().parents if folder.exists())
    free_gib = shutil.disk_usage(existing).free / 1024**3
    return (
        f"checkpoint {path} could not be written ({reason}); {free_gib:.2f} GiB are free there; make room and continue "
        "from the last complete one with --resume"
    )
