"""Writes one checkpoint at a time in a thread of its own, beside training: in steps that all ranks take or none."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta

import numba
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from engram_checkpoints.backbone import BackboneSnapshot
from engram_checkpoints.checkpoint_files import FileSums
from engram_checkpoints.table_snapshot import TableSnapshot
from engram_checkpoints.table_writer import TableWriter
from engram_checkpoints.train_state import TrainState
from engram_megatron.training.parallel import Ranks
from engram_megatron.training.save_target import SaveTarget
from engram_megatron.training.together import Together

BACKBONE, TABLES = "backbone", "tables.zarr"


class SaveError(RuntimeError):
    """A checkpoint could not be written; the last complete one stands."""


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What a rank writes of a checkpoint, as it was when training went on. `started`: when that was asked for, of
    `time.perf_counter`."""

    started: float
    target: SaveTarget
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
    """A save that counts. `seconds` from the call of `save` to its end, of which training waited `stall_s`, in that
    call and in updates of the tables, on the rank that waited longest."""

    target: SaveTarget
    step: int
    seconds: float
    stall_s: float


class CheckpointWriter:
    """At most one checkpoint is in flight. The thread's collectives run on a gloo group of its own. All ranks call the
    same methods in the same order, but for `has_failed`, `take_saved` and `take_failures`."""

    def __init__(self, ranks: Ranks, timeout_s: int) -> None:
        """Collective."""
        self.ranks = ranks
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
        # One thread of numba's: the others are training's.
        self._executor = ThreadPoolExecutor(
            1, thread_name_prefix="checkpoint", initializer=numba.set_num_threads, initargs=(1,)
        )
        self._in_flight: tuple[SaveTarget, Future[SavedCheckpoint]] | None = None
        self._saved: list[SavedCheckpoint] = []
        self._failures: list[str] = []

    def write(self, snapshot: Snapshot, *, wait: bool) -> None:
        """Write a checkpoint beside the caller, or while it waits, and raise then as `finish` does."""
        assert self._in_flight is None, "one checkpoint at a time"
        stall_s = None if wait else snapshot.seconds
        self._in_flight = snapshot.target, self._executor.submit(self._write, snapshot, stall_s)
        if wait:
            self.finish()

    @property
    def has_failed(self) -> bool:
        """Whether `finish` will raise, as far as this rank knows by now."""
        if self._in_flight is None:
            return False
        target, future = self._in_flight
        return not target.may_fail and future.done() and future.exception() is not None

    def finish(self) -> None:
        """Wait for the checkpoint in flight, if there is one.

        Raises `SaveError` on all ranks, once, where one of them could not write one that must not fail.
        """
        if self._in_flight is not None:
            (target, future), self._in_flight = self._in_flight, None
            try:
                self._saved.append(future.result())
            except SaveError as error:
                if not target.may_fail:
                    raise
                self._failures.append(str(error))

    def take_saved(self) -> list[SavedCheckpoint]:
        """Checkpoints that were completed since the last call."""
        self._look()
        saved, self._saved = self._saved, []
        return saved

    def take_failures(self) -> list[str]:
        """What is to be said of those since the last call that training goes on without."""
        self._look()
        failures, self._failures = self._failures, []
        return failures

    def _look(self) -> None:
        if self._in_flight is not None and self._in_flight[1].done() and not self.has_failed:
            self.finish()

    def close(self) -> None:
        """End the thread."""
        self._executor.shutdown()

    def _write(self, snapshot: Snapshot, stall_s: float | None) -> SavedCheckpoint:
        """In the thread. `stall_s`: what training has waited so far; None: it waits for the end."""
        target = snapshot.target
        together = Together(self._group, (OSError, CheckpointException), SaveError, target.reason)
        sums = FileSums(target.path)
        try:
            together(lambda: self._begin(snapshot, sums))
            together(lambda: _write_tables(snapshot, sums))
        finally:
            if snapshot.tables is not None:
                snapshot.tables.close()
        together(lambda: snapshot.backbone.write(target.path / BACKBONE, sums, self._group))
        target.complete(together, self._group, sums)
        waited_s = snapshot.seconds if stall_s is None else stall_s + snapshot.update_stall_s
        waits = together(lambda: waited_s)
        return SavedCheckpoint(target=target, step=snapshot.state.step, seconds=snapshot.seconds, stall_s=max(waits))

    def _begin(self, snapshot: Snapshot, sums: FileSums) -> None:
        """The folder, with what the first rank alone writes of it."""
        snapshot.target.begin()
        if self.ranks.is_first:
            snapshot.state.write(snapshot.target.path, sums)
            if snapshot.tables is not None:
                snapshot.tables.create(snapshot.target.path / TABLES, sums)


def _write_tables(snapshot: Snapshot, sums: FileSums) -> None:
    if snapshot.tables is not None:
        with TableWriter(snapshot.target.path / TABLES, snapshot.tables.description, sums) as writer:
            snapshot.tables.write(writer)
