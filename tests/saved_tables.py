"""Tables of one rank, or of several, written as a checkpoint has them."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist

from engram_checkpoints.checkpoint_files import FileSums
from engram_checkpoints.table_snapshot import TableSnapshot
from engram_checkpoints.table_writer import TableWriter
from engram_megatron.optimizer.row_optimizer import RowOptimizer


def save_tables(path: Path, optimizer: RowOptimizer) -> Path:
    """Write the shard of every rank that calls this; returns `path`."""
    snapshot, sums = TableSnapshot(optimizer), FileSums(path.parent)
    if not dist.is_initialized() or dist.get_rank() == 0:
        snapshot.create(path, sums)
    if dist.is_initialized():
        dist.barrier()
    with TableWriter(path, snapshot.description, sums) as writer:
        snapshot.write(writer)
    snapshot.close()
    return path
