"""Tables whose arrays are whole tensors: rows in order, nothing left out."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from engram_checkpoints.table_format import LAST_STEP, LEARNING_RATES, WEIGHT, TableDescription
from engram_checkpoints.tensor_source import TensorInfo, TensorSource
from engram_kernels.row_state import RowState, empty_rows
from engram_megatron.model.counts import TABLES_NAME


def tensor_name(array: str) -> str:
    """`engram.tables.weight` of `weight`."""
    return f"{TABLES_NAME}.{array}"


def table_tensors(description: TableDescription) -> dict[str, TensorInfo]:
    """What a table is as tensors. `learning_rates` is left out before the first: empty tensors are not stored."""
    wide = torch.from_numpy(np.empty(0, description.dtype)).dtype
    rows, dim = description.total_rows, description.row_dim
    arrays = {name: TensorInfo((rows, dim), wide) for name in (WEIGHT, *description.moments)}
    arrays[LAST_STEP] = TensorInfo((rows,), torch.int32)
    if description.step_count:
        arrays[LEARNING_RATES] = TensorInfo((description.step_count,), torch.float64)
    return {tensor_name(name): info for name, info in arrays.items()}


def row_tensors(description: TableDescription, rows: RowState) -> dict[str, torch.Tensor]:
    """The part of each tensor that `rows` are."""
    moments = np.hsplit(rows.state, rows.moments)
    arrays: dict[str, NDArray[Any]] = {WEIGHT: rows.weight, LAST_STEP: rows.last_step}
    arrays |= dict(zip(description.moments, moments, strict=True))
    return {tensor_name(name): torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}


class TensorTables:
    """A `TableSource` of the tensors that `table_tensors` names."""

    def __init__(self, description: TableDescription, tensors: TensorSource) -> None:
        self.description, self._tensors = description, tensors

    def rows(self, start: int, stop: int) -> RowState:
        description = self.description
        rows = empty_rows(stop - start, description.row_dim, description.dtype, description.num_moments)
        rows.weight[:] = self._read(WEIGHT, start, stop)
        for moment, name in zip(np.hsplit(rows.state, rows.moments), description.moments, strict=True):
            moment[:] = self._read(name, start, stop)
        rows.last_step[:] = self.last_step(start, stop)
        return rows

    def last_step(self, start: int, stop: int) -> NDArray[np.int32]:
        last_step: NDArray[np.int32] = self._read(LAST_STEP, start, stop)
        return last_step

    def learning_rates(self) -> NDArray[np.float64]:
        return (
            self._read(LEARNING_RATES, 0, self.description.step_count) if self.description.step_count else np.empty(0)
        )

    def _read(self, array: str, start: int, stop: int) -> NDArray[Any]:
        return self._tensors.read(tensor_name(array), slice(start, stop)).numpy()
