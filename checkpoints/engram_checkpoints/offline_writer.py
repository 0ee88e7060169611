"""A whole checkpoint written by one process without a model, with bounded memory: for programs that make one from
another, or from other files."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram_checkpoints.backbone_writer import BackboneWriter
from engram_checkpoints.read_ahead import read_ahead
from engram_checkpoints.table_format import TableDescription, create
from engram_checkpoints.table_writer import TableWriter
from engram_checkpoints.target_folder import TargetFolder
from engram_checkpoints.train_state import TrainState
from engram_kernels.row_state import RowState

BACKBONE, TABLES = "backbone", "tables.zarr"
_UNIT_BYTES = 128 * 1024**2  # of rows: what is written anew after a kill, at most


class OfflineWriter:
    """Writes to `TARGET.partial`, which becomes `target` when all of it is on disk. In this order: `backbone`, then
    `write_tables` where the model has them, then `finish`."""

    def __init__(
        self,
        target: Path,
        job: dict[str, Any] | None = None,
        piece_bytes: int | None = None,
        on_bytes: Callable[[int], None] = lambda _bytes: None,
    ) -> None:
        """`job`: see `TargetFolder`, with it a second try goes on where the first was killed; the rest as of
        `BackboneWriter`. Raises `UsageError` where something stands at `target`."""
        self._target = TargetFolder(target, job)
        self._on_bytes = on_bytes
        self.target, self.folder, self.sums = target, self._target.folder, self._target.sums
        self.backbone = BackboneWriter(self.folder / BACKBONE, self.sums, piece_bytes, on_bytes)

    def write_tables(
        self,
        description: TableDescription,
        learning_rates: NDArray[np.float64],
        rows: Callable[[int, int], RowState],
    ) -> None:
        """Write all blocks; `rows(start, stop)` gives rows start .. stop - 1, a copy, as `RowState.exact` does. It is
        called in a thread, in the order of rows."""
        path = self.folder / TABLES
        if not self.sums.is_done("tables"):
            shutil.rmtree(path, ignore_errors=True)
            create(path, description, learning_rates, self.sums)
            self.sums.commit("tables")
        row_bytes = description.row_dim * np.dtype(description.dtype).itemsize * (1 + description.num_moments)
        step = description.block_rows * max(1, _UNIT_BYTES // (description.block_rows * row_bytes))
        for start in range(0, description.total_rows, step):
            stop = min(start + step, description.total_rows)
            if self.sums.is_done(f"tables from row {start}"):
                self._on_bytes((stop - start) * row_bytes)
                continue
            with TableWriter(path, description, self.sums) as writer:
                firsts = range(start, stop, description.block_rows)
                blocks = read_ahead(partial(rows, at, min(at + description.block_rows, stop)) for at in firsts)
                for first, block in zip(firsts, blocks, strict=True):
                    if writer.write_last_step(first, block.last_step):
                        writer.write_rows(first, block)
                    self._on_bytes(block.num_rows * row_bytes)
            self.sums.commit(f"tables from row {start}")

    def finish(self, state: TrainState, num_steps: int) -> None:
        """`num_steps`: updates that the backbone's optimizer has done."""
        self.backbone.close(num_steps)
        state.write(self.folder, self.sums)
        self._target.finish()
