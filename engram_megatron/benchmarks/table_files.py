"""Saving and loading tables against plain sequential files of the same bytes on the same disk."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from engram_checkpoints.checkpoint_files import FileSums
from engram_checkpoints.table_snapshot import TableSnapshot
from engram_checkpoints.table_writer import TableWriter
from engram_checkpoints.tables import load_shard
from engram_kernels.catch_up import CatchUp
from engram_megatron.benchmarks.measure import Comparison, interleaved
from engram_megatron.optimizer.row_adam import RowAdam
from engram_megatron.tables.row_gradients import RowGradients
from engram_megatron.tables.row_layout import RowLayout
from engram_megatron.tables.table_shard import TableShard

ROW_DIM, BLOCK_ROWS = 80, 16384
TARGET = 0.7
SETTLE_S = 1.0
WRITE_BYTES = 16 * 1024**2  # of a plain file at a time


def trained_tables(num_rows: int) -> RowAdam:
    """A rank's float32 tables all of whose rows have had a gradient: nothing of them can be left out of a save."""
    adam = RowAdam(TableShard(RowLayout(num_rows, BLOCK_ROWS, 1), 0, ROW_DIM), CatchUp(0.9, 0.95, 1e-20))
    adam.shard.initialize(seed=1, std=0.02)
    for start in range(0, num_rows, 65536):
        rows = np.arange(start, min(start + 65536, num_rows))
        gradients = np.random.default_rng(start).standard_normal((rows.size, ROW_DIM), np.float32)
        adam.step(RowGradients.summed(rows, [gradients]), 1e-3)
    return adam


def save(path: Path, adam: RowAdam) -> None:
    """As a checkpoint does it, until all is on disk."""
    snapshot, sums = TableSnapshot(adam), FileSums(path.parent)
    snapshot.create(path, sums)
    with TableWriter(path, snapshot.description, sums) as writer:
        snapshot.write(writer)
    snapshot.close()
    sums.flush()


def write_plain(path: Path, num_bytes: int) -> None:
    content = np.random.default_rng(0).bytes(WRITE_BYTES)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for start in range(0, num_bytes, WRITE_BYTES):
        os.write(descriptor, content[: min(WRITE_BYTES, num_bytes - start)])
    os.fsync(descriptor)
    os.close(descriptor)


def read_plain(path: Path, into: np.ndarray) -> None:
    view = memoryview(into.reshape(-1).view(np.uint8))
    with path.open("rb", buffering=0) as file:
        start = 0
        while count := file.readinto(view[start : start + WRITE_BYTES]):
            start += count


def forget(folder: Path) -> None:
    """Drop the files below `folder` from the page cache, and let the disk come to rest."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)
    time.sleep(SETTLE_S)


def settle(path: Path) -> None:
    """Remove what stands at `path`, and let the disk come to rest: the one before would slow the next."""
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    os.sync()
    time.sleep(SETTLE_S)


def compare(folder: Path, num_rows: int, repeats: int) -> Iterator[Comparison]:
    """Save and load of `num_rows` rows by one rank, next to plain files, in `folder`."""
    adam = trained_tables(num_rows)
    tables, plain = folder / "tables.zarr", folder / "plain"
    save(tables, adam)
    num_bytes = sum(path.stat().st_size for path in tables.rglob("*") if path.is_file())
    size = f"{num_bytes / 2**30:.2f} GiB"
    seconds = interleaved(
        {"save": lambda: save(tables, adam), "write": lambda: write_plain(plain, num_bytes)},
        repeats,
        prepare={"save": lambda: settle(tables), "write": lambda: settle(plain)},
    )
    yield Comparison(
        f"save {size} of tables", seconds["save"], "one file, written and synced", seconds["write"], TARGET
    )
    into = np.empty(num_bytes, np.uint8)
    loaded = RowAdam(TableShard(adam.shard.layout, 0, ROW_DIM), CatchUp(0.9, 0.95, 1e-20))
    loaded.shard.initialize(seed=2, std=0.02)  # all memory is there
    seconds = interleaved(
        {"load": lambda: load_shard(tables, loaded), "read": lambda: read_plain(plain, into)},
        repeats,
        prepare={"load": lambda: forget(tables), "read": lambda: forget(folder)},
    )
    yield Comparison(f"load {size} of tables", seconds["load"], "one file, from disk", seconds["read"], TARGET)
