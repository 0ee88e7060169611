"""What a rank's resident memory reaches while its tables are started, saved and loaded."""

from __future__ import annotations

import resource
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from engram_checkpoints.checkpoint_files import FileSums
from engram_checkpoints.table_snapshot import TableSnapshot
from engram_checkpoints.table_writer import TableWriter
from engram_checkpoints.tables import load_shard
from engram_kernels.catch_up import CatchUp
from engram_megatron import platform
from engram_megatron.optimizer.row_adam import RowAdam
from engram_megatron.tables.row_gradients import RowGradients
from engram_megatron.tables.row_layout import RowLayout
from engram_megatron.tables.table_shard import TableShard

NUM_ROWS, ROW_DIM, BLOCK_ROWS = 2_228_224, 80, 4096  # 2 GiB in bfloat16 with remainders and moments
TARGET = 1.10


@dataclass(frozen=True)
class Peak:
    """Bytes: of the tables, and the most that was resident beyond what was before them."""

    tables: int
    resident: int


def start_and_save(rank: int, world_size: int, path: Path) -> Peak:
    """On one forked rank: initial rows, a step of every eighth row, a save."""
    platform.limit_threads(1)
    before = _resident()
    adam = _tables()
    adam.shard.initialize(seed=1, std=0.02)
    rows = np.arange(0, NUM_ROWS, 8)
    adam.step(RowGradients.summed(rows, [np.full((rows.size, ROW_DIM), 1e-3, np.float32)]), 1e-3)
    snapshot, sums = TableSnapshot(adam), FileSums(path.parent)
    snapshot.create(path, sums)
    with TableWriter(path, snapshot.description, sums) as writer:
        snapshot.write(writer)
    snapshot.close()
    return Peak(adam.shard.memory.resident_bytes(), _peak() - before - rows.size * ROW_DIM * 4)


def load(rank: int, world_size: int, path: Path) -> Peak:
    """On one forked rank."""
    platform.limit_threads(1)
    before = _resident()
    adam = _tables()
    load_shard(path, adam)
    return Peak(adam.shard.memory.resident_bytes(), _peak() - before)


def _tables() -> RowAdam:
    shard = TableShard(RowLayout(NUM_ROWS, BLOCK_ROWS, 1), 0, ROW_DIM, "bfloat16")
    return RowAdam(shard, CatchUp(0.9, 0.95, 1e-20))


def _resident() -> int:
    return int(psutil.Process().memory_info().rss)


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def lines(run: Callable[..., list[Peak]]) -> Iterator[str]:
    """The peaks as text; `run` is `layouts.forked_ranks.run_ranks`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "tables.zarr")
        for name, measure in (("start, step and save", start_and_save), ("load", load)):
            (peak,) = run(measure, 1, path, timeout_s=900.0)
            ratio = peak.resident / peak.tables
            yield (
                f"peak resident memory, {name}: {peak.resident / 2**30:.2f} GiB for {peak.tables / 2**30:.2f} GiB of "
                f"tables, {ratio:.2f} (at most {TARGET:.2f}: {'ok' if ratio <= TARGET else 'short'})"
            )
