"""What is kept per table row: three arrays over the rows of a shard, and the layout of the optimizer's record.

Shape letters: n rows, D columns of a row, S width of a record.

    weight     [n, D]  float32, float64, or uint16 that holds bfloat16 bits: what a gather reads
    state      [n, S]  exp_avg in [:, :D], exp_avg_sq in [:, D:2D] where the optimizer has one; float32, float64 for
                       float64 weights
    last_step  [n]     int32, the optimizer step (from 1) as of which a row stands: that of its last gradient, or of a
                       later sweep over the table; 0: it never had a gradient, moments zero

S = 2D, or D with one moment. With bfloat16 weights the record ends with D int16 remainders in D / 2 more floats (D
even), which complete the weights to an exact float32 (`split_float`): 12 bytes per parameter in all, 8 with one moment.
One row's record is contiguous, so that an update of a random row walks few pages.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from engram_kernels.split_float import join, split

SPLIT = np.dtype(np.uint16)  # the dtype of bfloat16 bits


@dataclass(frozen=True, eq=False)
class RowState:
    """The arrays of the module's docstring; they may be views of memory that several processes share."""

    weight: NDArray[Any]
    state: NDArray[Any]
    last_step: NDArray[np.int32]

    def __post_init__(self) -> None:
        n, D = self.weight.shape
        widths = [state_width(self.weight.dtype, D, moments) for moments in (1, 2)]
        assert self.state.shape[0] == n, (self.state.shape, n)
        assert self.state.shape[1] in widths, (self.state.shape, widths)
        assert self.state.dtype == compute_dtype(self.weight.dtype), (self.state.dtype, self.weight.dtype)
        assert self.last_step.shape == (n,), (self.last_step.shape, n)
        assert self.last_step.dtype == np.int32, self.last_step.dtype
        assert all(a.flags.c_contiguous for a in (self.weight, self.state, self.last_step)), "rows must be contiguous"

    @property
    def num_rows(self) -> int:
        return int(self.weight.shape[0])

    @property
    def row_dim(self) -> int:
        return int(self.weight.shape[1])

    @property
    def is_split(self) -> bool:
        """Whether the weights are bfloat16 bits that remainders complete."""
        return self.weight.dtype == SPLIT

    @property
    def moments(self) -> int:
        """How many numbers the optimizer keeps of each weight: 1 or 2."""
        return 1 if self.state.shape[1] < 2 * self.row_dim else 2

    @property
    def exp_avg(self) -> NDArray[Any]:
        """View [n, D] of the first moments."""
        return self.state[:, : self.row_dim]

    @property
    def exp_avg_sq(self) -> NDArray[Any]:
        """View [n, D] of the second moments."""
        assert self.moments == 2, self.moments
        return self.state[:, self.row_dim : 2 * self.row_dim]

    @property
    def remainder(self) -> NDArray[np.int16] | None:
        """View [n, D] int16 of the remainders; None where the weights are whole."""
        return self.state.view(np.int16)[:, -self.row_dim :] if self.is_split else None

    def master(self, rows: slice | NDArray[np.int64] = slice(None)) -> NDArray[Any]:
        """A copy [k, D] of the weights of `rows` in the precision in which they are trained: float32 or float64."""
        remainder = self.remainder
        return np.array(self.weight[rows]) if remainder is None else join(self.weight[rows], remainder[rows])

    def set_master(self, rows: slice | NDArray[np.int64], values: NDArray[Any]) -> None:
        """Write `values` [k, D] of `master`'s dtype to `rows`."""
        remainder = self.remainder
        if remainder is None:
            self.weight[rows] = values
        else:
            self.weight[rows], remainder[rows] = split(values)

    def exact(self, rows: slice | NDArray[np.int64] = slice(None)) -> RowState:
        """A copy of `rows` whose weights are those of `master`; without remainders, therefore."""
        moments = self.state[rows, : self.moments * self.row_dim].copy()
        return RowState(self.master(rows), moments, self.last_step[rows].copy())

    def set_exact(self, rows: slice | NDArray[np.int64], values: RowState) -> None:
        """Write to `rows` what `exact` gives."""
        self.set_master(rows, values.weight)
        self.state[rows, : self.moments * self.row_dim] = values.state
        self.last_step[rows] = values.last_step


def compute_dtype(weight_dtype: DTypeLike) -> np.dtype[Any]:
    """The type of moments, gradients and arithmetic: float64 for float64 weights, otherwise float32."""
    dtype = np.dtype(weight_dtype)
    assert dtype in (SPLIT, np.float32, np.float64), dtype
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


def state_width(weight_dtype: DTypeLike, row_dim: int, moments: int = 2) -> int:
    """S, the floats of a row's record."""
    if np.dtype(weight_dtype) != SPLIT:
        return moments * row_dim
    assert row_dim % 2 == 0, f"remainders of {row_dim} columns do not fill whole floats"
    return moments * row_dim + row_dim // 2


def row_bytes(weight_dtype: DTypeLike, row_dim: int, moments: int = 2) -> int:
    """Host memory of one row: weight, record and last step."""
    record = state_width(weight_dtype, row_dim, moments) * compute_dtype(weight_dtype).itemsize
    return row_dim * np.dtype(weight_dtype).itemsize + record + np.dtype(np.int32).itemsize


def empty_rows(num_rows: int, row_dim: int, weight_dtype: DTypeLike, moments: int = 2) -> RowState:
    """Rows to be written, with any content."""
    return RowState(
        np.empty((num_rows, row_dim), weight_dtype),
        np.empty((num_rows, state_width(weight_dtype, row_dim, moments)), compute_dtype(weight_dtype)),
        np.empty(num_rows, np.int32),
    )


def zero_rows(num_rows: int, row_dim: int, weight_dtype: DTypeLike, moments: int = 2) -> RowState:
    """Rows of zeros that never had a gradient; nothing is resident before it is written."""
    return RowState(
        np.zeros((num_rows, row_dim), weight_dtype),
        np.zeros((num_rows, state_width(weight_dtype, row_dim, moments)), compute_dtype(weight_dtype)),
        np.zeros(num_rows, np.int32),
    )
