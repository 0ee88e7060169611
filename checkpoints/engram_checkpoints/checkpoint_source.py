"""A checkpoint of any format that we read, as one thing: its state, its tensors, its tables."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from engram_checkpoints.table_format import TableDescription
from engram_checkpoints.tensor_source import TensorSource
from engram_checkpoints.train_state import TrainState
from engram_kernels.row_state import RowState

Format = Literal["engram", "torch_dist", "legacy"]


class TableSource(Protocol):
    """Where rows can be read from; every method raises `UsageError` for what cannot be read."""

    description: TableDescription

    def rows(self, start: int, stop: int) -> RowState:
        """A copy of rows start .. stop - 1, as `RowState.exact` gives them."""

    def last_step(self, start: int, stop: int) -> NDArray[np.int32]:
        """Of rows start .. stop - 1."""

    def learning_rates(self) -> NDArray[np.float64]:
        """Of all steps so far."""


@dataclass(frozen=True, kw_only=True)
class CheckpointSource:
    """One checkpoint. `num_steps`: updates that the backbone's optimizer has done."""

    path: Path
    format: Format
    state: TrainState
    backbone: TensorSource
    num_steps: int
    tables: TableSource | None

    @property
    def table_bytes(self) -> int:
        """Of all rows with their moments, whatever is stored of them."""
        return 0 if self.tables is None else row_bytes(self.tables.description) * self.tables.description.total_rows

    @property
    def num_bytes(self) -> int:
        """Of all tensors and tables."""
        return sum(info.num_bytes for info in self.backbone.tensors.values()) + self.table_bytes


def row_bytes(description: TableDescription) -> int:
    """Of one row with its moments."""
    return description.row_dim * np.dtype(description.dtype).itemsize * (1 + description.num_moments)
