"""One rank's rows as they were at one moment, written while updates go on (copy on update, row by row).

The writer goes through the blocks in order: it copies a block and hands the copy over to be written. Before an update
changes rows that the writer has not copied yet, it keeps copies of them (`StagedRows`); the writer puts them over the
block that it has copied. So a row is written as it was, whether the writer or an update came first, and the writer
needs no lock while it copies a block: what changes under its hands was kept before.
"""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engram_checkpoints.checkpoint_files import FileSums
from engram_checkpoints.staged_rows import StagedRows
from engram_checkpoints.table_format import Base, TableDescription, create
from engram_checkpoints.table_writer import TableWriter
from engram_kernels.row_state import RowState
from engram_megatron.optimizer.row_optimizer import RowOptimizer
from engram_megatron.tables.row_layout import Block

Int64 = NDArray[np.int64]
ROWS_AT_ONCE = 65536  # that an update looks at before the writer has its turn


class TableSnapshot:
    """The rows that `optimizer` updates as they stand when this is made, at rest. Call `write` in any thread, `close`
    in any case.

    Updates keep copies of at most `staging_bytes`, then they wait for the writer; with 0 they wait for every row that
    is not copied yet. With `base` only rows that changed since are written. `stall_s`: seconds that updates have spent
    on copies and waits.
    """

    def __init__(self, optimizer: RowOptimizer, staging_bytes: int = 0, base: Base | None = None) -> None:
        self.shard = optimizer.shard
        self.description = replace(TableDescription.of(optimizer), base=base)
        self.learning_rates = optimizer.learning_rates.copy()
        self.stall_s = 0.0
        self._staged = StagedRows(self.shard.store, staging_bytes)
        self._next_row = 0  # the first row (of the shard's numbers) that the writer has not copied
        self._progress = threading.Condition()  # of the writer; guards the two above
        assert self.shard.observer is None, "one snapshot at a time"
        self.shard.observer = self

    def create(self, path: Path, sums: FileSums) -> None:
        """Make the group at `path` without its rows: on one rank, before any writes."""
        create(path, self.description, self.learning_rates, sums)

    def write(self, writer: TableWriter) -> None:
        """Write the rows of this rank, one block at a time.

        Raises `OSError` where the disk does not take them.
        """
        for block in self.shard.layout.blocks(self.shard.shard):
            rows = self._copy(block)
            if writer.write_last_step(block.start, rows.last_step):
                writer.write_rows(block.start, rows.exact() if rows.is_split else rows)

    def close(self) -> None:
        """Let updates go on freely, whether everything was written or not."""
        self.shard.observer = None
        with self._progress:
            self._next_row = self.shard.num_rows
            self._progress.notify_all()

    def before_update(self, local_rows: Int64, *, sweep: bool) -> None:
        """As of `UpdateObserver`. The rows that the writer reaches last are copied first, so that those which have to
        wait for it are its next ones."""
        started = time.perf_counter()
        stop = self.shard.num_rows
        while stop > self._next_row:
            start = max(0, stop - ROWS_AT_ONCE)
            self._keep(self._changing(start, stop, local_rows, sweep))
            stop = start
        self.stall_s += time.perf_counter() - started

    def _changing(self, start: int, stop: int, local_rows: Int64, sweep: bool) -> Int64:
        """Those of the rows `start` .. `stop` - 1 that an update changes."""
        first, last = np.searchsorted(local_rows, (start, stop))
        rows = local_rows[first:last]
        if not sweep:
            return rows
        changes = self.shard.last_step[start:stop] > 0
        changes[rows - start] = True
        return start + np.flatnonzero(changes)

    def _keep(self, rows: Int64) -> None:
        """Copy `rows`, strictly rising, the last ones first; wait for the writer to copy those for which there is no
        room."""
        with self._progress:
            rows = self._staged.without_copy(rows)
            while (rows := rows[np.searchsorted(rows, self._next_row) :]).size:
                if self._staged.room == 0:
                    self._progress.wait()
                    continue
                first = max(0, rows.size - self._staged.room)
                self._staged.add(rows[first:])
                rows = rows[:first]

    def _copy(self, block: Block) -> RowState:
        """The rows of a block as they were, with anything in place of those that are not to be stored; from now on they
        may change."""
        store, local = self.shard.store, block.local
        rows = store.format.empty(block.num_rows)
        rows.last_step[:] = store.last_step[local]  # or later ones: what was not stored then may be now
        at = np.flatnonzero(self.description.is_stored(rows.last_step))
        store.copy_to(local.start + at, rows, at)
        with self._progress:
            self._staged.take_into(rows, local)
            self._next_row = max(self._next_row, local.stop)
            self._progress.notify_all()
        return rows
