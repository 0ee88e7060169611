"""A snapshot is written as the rows were when it was made, whatever updates do, and changes nothing of them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ranks import run_ranks
from sharded_tables import Tables, balanced_tables, sharded_tables

from engram_checkpoints import table_snapshot
from engram_checkpoints.table_format import TableDescription
from engram_checkpoints.table_snapshot import TableSnapshot
from engram_kernels.row_state import RowState
from engram_megatron import platform
from engram_megatron.optimizer.row_optimizer import RowOptimizer
from engram_megatron.tables.host_rows import HostPlacement
from engram_megatron.tables.nvme_placement import NvmePlacement
from engram_megatron.tables.row_gradients import RowGradients
from engram_megatron.tables.row_init import fill_initial_rows
from engram_megatron.tables.row_store import Placement
from engram_megatron.tables.table_shard import TableShard

ROWS, DIM, BLOCK_ROWS, STEPS = 230, 6, 16, 12  # the last block is short


def _step(optimizer: RowOptimizer, step: int) -> None:
    """A few rows, then half of all rows, so that all are moved, in turn; rows from 200 on never occur."""
    shard = optimizer.shard
    share = 0.5 if step % 4 == 3 else 0.1
    used = np.flatnonzero(np.random.default_rng(step).random(200) < share)
    gradients = np.empty((used.size, DIM), shard.wide)
    fill_initial_rows(gradients, 1000 * step, seed=1, std=1.0)
    optimizer.step(RowGradients.summed(used, [gradients]), lr=0.01)


def _optimizer(update: str, **options: Any) -> RowOptimizer:
    tables = Tables(rows=ROWS, row_dim=DIM, block_rows=BLOCK_ROWS, touched_only=update == "touched", **options)
    if update == "sinkhorn":
        return balanced_tables(tables, (0, 100))[1]
    return sharded_tables(tables)[1]


def _everything(shard: TableShard) -> RowState:
    return shard.exact(np.arange(shard.num_rows))


class _Written:
    """A writer that keeps what it is given, as one table. `before_block` is called with each block's first row."""

    def __init__(self, optimizer: RowOptimizer, before_block: Callable[[int], Any]) -> None:
        self.description = TableDescription.of(optimizer)
        self.before_block = before_block
        self.rows = _everything(optimizer.shard)
        self.rows.weight[:], self.rows.state[:], self.rows.last_step[:] = np.nan, np.nan, -1

    def write_last_step(self, first_row: int, last_step: np.ndarray) -> bool:
        self.before_block(first_row)
        self.rows.last_step[first_row : first_row + last_step.size] = last_step
        return bool(self.description.is_stored(last_step).any())

    def write_rows(self, first_row: int, rows: RowState) -> None:
        self.rows.set_exact(np.arange(first_row, first_row + rows.num_rows), rows)


def _assert_same(found: RowState, expected: RowState, compared: np.ndarray | slice = slice(None)) -> None:
    np.testing.assert_array_equal(found.weight[compared], expected.weight[compared])
    np.testing.assert_array_equal(found.state[compared], expected.state[compared])
    np.testing.assert_array_equal(found.last_step, expected.last_step)


CASES = [
    *(("dense", dtype, "host") for dtype in ("float32", "bfloat16", "float64")),
    *(("dense", "float32", "lazy"), ("dense", "float32", "lazy nvme"), ("dense", "bfloat16", "nvme")),
    *(("touched", "bfloat16", "nvme"), ("touched", "float64", "lazy")),
    *(("sinkhorn", "float32", "host"), ("sinkhorn", "bfloat16", "lazy")),
]


def test_snapshot_beside_updates_is_the_shard_as_it_was(disk: Path) -> None:
    run_ranks(_check_cases, 1, str(disk), timeout_s=400)  # all kernels may have to be compiled for all dtypes first


def _check_cases(_rank: int, _world_size: int, disk: str) -> None:
    platform.limit_threads(1)  # or waking threads for a few rows takes most of the time
    table_snapshot.ROWS_AT_ONCE = 50  # or one look would take in the whole table
    for update, dtype, where in CASES:
        commit: Any = "lazy" if where.startswith("lazy") else "eager"
        placement: Placement = HostPlacement(commit=commit)
        if where.endswith("nvme"):
            placement = NvmePlacement(folder=disk, hot_fraction=0.05, commit=commit)
        for room in (ROWS, 40, 0):
            _check_snapshot(update, room, dtype=dtype, placement=placement)


def _check_snapshot(update: str, room: int, **options: Any) -> None:
    """Updates run before (if there is room for all rows), beside and after the writer."""
    optimizer, expected = (_optimizer(update, **options) for _ in range(2))
    for step in range(4):
        _step(optimizer, step)
        _step(expected, step)
    then = _everything(optimizer.shard)
    snapshot = TableSnapshot(optimizer, (room + 1) * _row_bytes(optimizer.shard) - 1)
    assert snapshot._staged.capacity == room
    started = threading.Event()
    written = _Written(optimizer, lambda _row: time.sleep(0.001))
    writer = threading.Thread(target=lambda: (started.wait(), snapshot.write(written)))
    writer.start()
    for step in range(4, STEPS):
        if step == 5 or room < ROWS:
            started.set()
        _step(optimizer, step)
    writer.join()
    snapshot.close()
    assert snapshot._staged.room == room, "copies that were written make room"
    _step(optimizer, STEPS)
    for step in range(4, STEPS + 1):
        _step(expected, step)
    _assert_same(written.rows, then, then.last_step > 0)
    _assert_same(_everything(optimizer.shard), _everything(expected.shard))


def _row_bytes(shard: TableShard) -> int:
    """Of a copy: 12 (24, with one moment less by a third) per column, its last step and the place where it lies."""
    return DIM * (1 + shard.moments) * shard.wide.itemsize + 4 + 4


def test_update_waits_only_for_what_has_no_room_and_only_until_the_writer_has_it() -> None:
    optimizer = _optimizer("touched")
    snapshot = TableSnapshot(optimizer, 20 * _row_bytes(optimizer.shard))
    rows = np.arange(ROWS - 40, ROWS)  # 20 of them with a place: the last
    gradients = RowGradients.summed(rows, [np.ones((40, DIM), np.float32)])
    update = threading.Thread(target=lambda: optimizer.step(gradients, lr=0.01))
    update.start()
    alive = {}

    def look(row: int) -> None:  # the block that begins here has been copied
        time.sleep(0.01)
        alive[row // BLOCK_ROWS] = update.is_alive()

    snapshot.write(_Written(optimizer, look))
    update.join()
    snapshot.close()
    assert [alive[number] for number in range(13)] == [True] * 13
    assert snapshot.stall_s >= 13 * 0.01


def test_failed_writer_lets_the_waiting_update_go_on() -> None:
    optimizer, expected = _optimizer("dense"), _optimizer("dense")
    snapshot = TableSnapshot(optimizer)

    def fail(_row: int) -> None:
        raise OSError("no space")

    update = threading.Thread(target=lambda: _step(optimizer, 0))
    update.start()
    with pytest.raises(OSError, match="no space"):
        snapshot.write(_Written(optimizer, fail))
    update.join(timeout=0.05)
    assert update.is_alive()
    snapshot.close()
    update.join(timeout=10)
    assert not update.is_alive()
    _step(expected, 0)
    _assert_same(_everything(optimizer.shard), _everything(expected.shard))
    _step(optimizer, 1)  # nobody is told any more
