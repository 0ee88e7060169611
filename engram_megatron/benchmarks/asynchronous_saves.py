"""How long training waits for a save of the tables that is written beside it.

A step here is a device's: the host sleeps while the tables' thread updates rows, and waits for that thread at its end,
as training does before it fetches the next rows.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from engram_checkpoints.checkpoint_files import FileSums
from engram_checkpoints.table_snapshot import TableSnapshot
from engram_checkpoints.table_writer import TableWriter
from engram_megatron.benchmarks.measure import Comparison
from engram_megatron.benchmarks.table_files import ROW_DIM, save, trained_tables
from engram_megatron.gather.worker import Worker
from engram_megatron.optimizer.row_adam import RowAdam
from engram_megatron.tables.row_gradients import RowGradients

STEP_S = 1.0
TARGET = 20.0  # the wait is at most 5 % of the save that is waited for
ROW_BYTES = 3 * ROW_DIM * 4


def compare(folder: Path, num_rows: int) -> Iterator[Comparison]:
    """For steps that use half of the rows, as the paper's batch does, and few; with room for all copies, and for an
    eighth of the rows."""
    adam, worker = trained_tables(num_rows), Worker(beside=True)
    path = folder / "tables.zarr"
    save(path, adam)  # once, so that nothing is slow for being new
    waited_for = _seconds_of_a_save(path, adam)
    everything = num_rows * (ROW_BYTES + 64)
    for share in (0.5, 0.02):
        gradients = _gradients(num_rows, share)
        for name, staging_bytes, target in (("all", everything, TARGET), ("an eighth", everything // 8, None)):
            wait = _wait(path, adam, worker, gradients, staging_bytes)
            title = f"wait for a save beside steps of {share:.0%} of the rows, room for {name}"
            yield Comparison(title, max(wait, 1e-4), "the same save, waited for", waited_for, target)
    worker.close()


def _gradients(num_rows: int, share: float) -> RowGradients:
    generator = np.random.default_rng(0)
    rows = np.sort(generator.choice(num_rows, int(num_rows * share), replace=False))
    return RowGradients.summed(rows, [generator.standard_normal((rows.size, ROW_DIM), np.float32)])


def _seconds_of_a_save(path: Path, adam: RowAdam) -> float:
    shutil.rmtree(path)
    started = time.perf_counter()
    save(path, adam)
    return time.perf_counter() - started


def _wait(path: Path, adam: RowAdam, worker: Worker, gradients: RowGradients, staging_bytes: int) -> float:
    """Seconds that the steps of a save took more than as many steps without one."""
    shutil.rmtree(path)
    started = time.perf_counter()
    snapshot, sums = TableSnapshot(adam, staging_bytes), FileSums(path.parent)
    num_steps = 0
    with ThreadPoolExecutor(1) as pool:
        written = pool.submit(_write, snapshot, path, sums)
        while num_steps == 0 or not written.done():
            _step(adam, worker, gradients)
            num_steps += 1
        with_save = time.perf_counter() - started
        written.result()
    started = time.perf_counter()
    for _ in range(num_steps):
        _step(adam, worker, gradients)
    return with_save - (time.perf_counter() - started)


def _write(snapshot: TableSnapshot, path: Path, sums: FileSums) -> None:
    snapshot.create(path, sums)
    with TableWriter(path, snapshot.description, sums) as writer:
        snapshot.write(writer)
    snapshot.close()
    sums.flush()


def _step(adam: RowAdam, worker: Worker, gradients: RowGradients) -> None:
    updated = worker.submit("update", lambda: adam.step(gradients, 1e-3))
    time.sleep(STEP_S)
    updated.result()
