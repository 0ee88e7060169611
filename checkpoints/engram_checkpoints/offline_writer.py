"""A whole checkpoint written by one process without a model, with bounded memory: for programs that make one from
another, or from other files."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engram_checkpoints.backbone_writer import BackboneWriter
from engram_checkpoints.checkpoint_files import FileSums, complete
from engram_checkpoints.table_format import TableDescription, create
from engram_checkpoints.table_writer import TableWriter
from engram_checkpoints.train_state import TrainState
from engram_kernels.row_state import RowState
from engram_megatron.errors import UsageError

BACKBONE, TABLES = "backbone", "tables.zarr"


class OfflineWriter:
    """Writes to `TARGET.partial`, which becomes `target` when all of it is on disk. In this order: `backbone`, then
    `write_tables` where the model has them, then `finish`."""

    def __init__(self, target: Path) -> None:
        """Raises `UsageError` where something stands at `target`; what an earlier try left half-written is removed."""
        if target.exists():
            raise UsageError(f"{target} exists already; choose another target, or remove it first")
        self.target = target
        self.folder = target.with_name(target.name + ".partial")
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        self.sums = FileSums(self.folder)
        self.backbone = BackboneWriter(self.folder / BACKBONE, self.sums)

    def write_tables(
        self,
        description: TableDescription,
        learning_rates: NDArray[np.float64],
        rows: Callable[[int, int], RowState],
    ) -> None:
        """Write all blocks; `rows(start, stop)` gives rows start .. stop - 1, a copy, as `RowState.exact` does."""
        path = self.folder / TABLES
        create(path, description, learning_rates, self.sums)
        with TableWriter(path, description, self.sums) as writer:
            for start in range(0, description.total_rows, description.block_rows):
                block = rows(start, min(start + description.block_rows, description.total_rows))
                if writer.write_last_step(start, block.last_step):
                    writer.write_rows(start, block)

    def finish(self, state: TrainState, num_steps: int) -> None:
        """`num_steps`: updates that the backbone's optimizer has done."""
        self.backbone.close(num_steps)
        state.write(self.folder, self.sums)
        complete(self.folder, self.sums.flush())
        self.folder.rename(self.target)
