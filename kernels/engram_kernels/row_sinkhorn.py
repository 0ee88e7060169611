"""Nesterov momentum and Sinkhorn balancing over a whole table, of which a shard holds some rows.

The optimizer of DeepSeek-V4.1's tables (its report, Algorithm 1). With G the gradient of a table [n, D]:

    M <- beta M + (1 - beta) G,  A = beta M + (1 - beta) G
    rows of A whose norm is at most tau times the mean norm of all rows become zero
    K alternating steps, the first and the last over rows, divide rows and columns of A by their norms
    W <- W - lr * gamma * sqrt(D) A

Every row with momentum moves in every step, and columns are balanced over all rows, so a step passes over all rows that
ever had a gradient, K // 2 + 2 times. A row is then a = its Nesterov gradient, c the product of all column divisors so
far: dividing by a row's norm undoes what earlier row steps did, so A is a * c / |a * c| after each of them. Only c, one
number per column, is kept between passes.

Momentum is stored as of a row's last gradient (`last_step`) and decays by beta^k in the k steps since. `RowState` holds
it in `exp_avg`; the records have no second moment. Norms and sums are float64, in an order that does not depend on the
number of threads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numba import njit, prange
from numpy.typing import NDArray

from engram_kernels.gather_rows import check_rows
from engram_kernels.row_arithmetic import load_row, store_row
from engram_kernels.row_state import RowState

_ROWS_PER_TASK = 4096

Float64 = NDArray[np.float64]


class _Rows(NamedTuple):
    """What the kernels know of a step's rows: see `MomentumStep`. Scalars have the type of the table's arithmetic."""

    state: Any
    last_step: Any
    start: Any
    stop: Any
    rows: Any
    gradients: Any
    powers: Any  # beta^k
    scale: Any
    beta: Any
    rest: Any  # 1 - beta
    step: Any


@dataclass(frozen=True, eq=False)
class MomentumStep:
    """A step's Nesterov gradient of the rows `start` .. `stop` - 1 of `table`, a part of one matrix.

    `rows` int64 [u], strictly rising, within them: those with a gradient, `gradients` [u, D] * `scale`. `step` is the
    number (from 1) of the step that is taken, `beta` the momentum. Call `blend` first and once.

    Raises `IndexError` for a row outside the table.
    """

    table: RowState
    start: int
    stop: int
    rows: NDArray[np.int64]
    gradients: NDArray[Any]
    scale: float
    step: int
    beta: float

    def __post_init__(self) -> None:
        check_rows(self.rows, self.table.num_rows)
        assert self.rows.size == 0 or (self.start <= self.rows[0] and self.rows[-1] < self.stop), (
            self.start,
            self.stop,
        )
        assert self.gradients.shape == (self.rows.size, self.table.row_dim), self.gradients.shape
        assert self.gradients.dtype == self.table.state.dtype, self.gradients.dtype

    def blend(self) -> None:
        """Take the gradients into the momentum of their rows."""
        _blend(self._of_step)

    def norm_sum(self) -> float:
        """Sum of the norms of all rows."""
        sums = np.zeros(self._num_tasks)
        _sum_norms(self._of_step, sums)
        return float(sums.sum())

    def column_squares(self, columns: Float64, threshold: float) -> Float64:
        """Of the rows whose norm is above `threshold`, times `columns` [D] and then divided by their norms: the sum of
        squares of each column, [D]."""
        sums = np.zeros((self._num_tasks, self.table.row_dim))
        _sum_columns(self._of_step, columns, threshold, sums)
        return np.asarray(sums.sum(axis=0))

    def move(self, columns: Float64, threshold: float, size: float) -> None:
        """Subtract `size` times those rows from their weights."""
        table = self.table
        halves = table.state.view(np.int16) if table.is_split else None
        _move(table.weight, halves, self._of_step, columns, threshold, size)

    @property
    def _num_tasks(self) -> int:
        return -(-(self.stop - self.start) // _ROWS_PER_TASK)

    @cached_property
    def _of_step(self) -> _Rows:
        convert = self.table.state.dtype.type
        return _Rows(
            self.table.state,
            self.table.last_step,
            self.start,
            self.stop,
            self.rows,
            self.gradients,
            np.power(self.beta, np.arange(self.step + 1)).astype(self.table.state.dtype),
            convert(self.scale),
            convert(self.beta),
            convert(1.0 - self.beta),
            self.step,
        )


@njit(nogil=True, cache=True, parallel=True)
def _blend(of: Any) -> None:
    for task in prange((of.rows.size + _ROWS_PER_TASK - 1) // _ROWS_PER_TASK):
        first = np.int64(task) * _ROWS_PER_TASK
        _blend_rows(of, first, min(first + _ROWS_PER_TASK, of.rows.size))


# A function of its own: numba loses what a parallel loop itself writes to the arrays of a tuple.
@njit(nogil=True, cache=True)
def _blend_rows(of: Any, first: Any, stop: Any) -> None:
    for i in range(first, stop):
        row = of.rows[i]
        decay = of.powers[of.step - of.last_step[row]]
        for column in range(of.gradients.shape[1]):
            of.state[row, column] = decay * of.state[row, column] + of.rest * (of.gradients[i, column] * of.scale)
        of.last_step[row] = of.step


@njit(nogil=True, cache=True, error_model="numpy")
def _nesterov_row(of: Any, row: Any, i: Any, out: Any) -> Any:
    """The row before balancing, to `out` [D]; returns its norm. `i`: the row's place among those with a gradient, or
    -1."""
    decay = of.beta * of.powers[of.step - of.last_step[row]]
    for column in range(out.size):
        out[column] = decay * of.state[row, column]
    if i >= 0:
        for column in range(out.size):
            out[column] += of.rest * (of.gradients[i, column] * of.scale)
    return _norm(out)


# Reassociation lets the compiler add in vectors: in an order that is fixed when it compiles, not by the data.
@njit(nogil=True, cache=True, fastmath={"reassoc", "nsz"})
def _norm(row: Any) -> Any:
    total = 0.0
    for column in range(row.size):
        value = np.float64(row[column])
        total += value * value
    return math.sqrt(total)


@njit(nogil=True, cache=True, error_model="numpy")
def _scaled_row(of: Any, row: Any, i: Any, columns: Any, threshold: Any, out: Any, scaled: Any) -> Any:
    """The balanced row times its norm, to `scaled` float64 [D]; returns the norm, 0 for a row that is none."""
    if _nesterov_row(of, row, i, out) <= threshold:
        return 0.0
    for column in range(columns.size):
        scaled[column] = np.float64(out[column]) * columns[column]
    return _norm(scaled)


@njit(nogil=True, cache=True, parallel=True, error_model="numpy")
def _sum_norms(of: Any, sums: Any) -> None:
    for task in prange(sums.size):
        first = of.start + np.int64(task) * _ROWS_PER_TASK
        out = np.empty(of.gradients.shape[1], of.state.dtype)
        coming = np.searchsorted(of.rows, first)
        for row in range(first, min(first + _ROWS_PER_TASK, of.stop)):
            has_gradient = coming < of.rows.size and of.rows[coming] == row
            if of.last_step[row] > 0:
                sums[task] += _nesterov_row(of, row, coming if has_gradient else -1, out)
            coming += has_gradient


@njit(nogil=True, cache=True, parallel=True, error_model="numpy")
def _sum_columns(of: Any, columns: Any, threshold: Any, sums: Any) -> None:
    for task in prange(sums.shape[0]):
        first = of.start + np.int64(task) * _ROWS_PER_TASK
        out, scaled = np.empty(columns.size, of.state.dtype), np.empty(columns.size)
        coming = np.searchsorted(of.rows, first)
        for row in range(first, min(first + _ROWS_PER_TASK, of.stop)):
            has_gradient = coming < of.rows.size and of.rows[coming] == row
            if of.last_step[row] > 0:
                norm = _scaled_row(of, row, coming if has_gradient else -1, columns, threshold, out, scaled)
                if norm > 0.0:
                    for column in range(columns.size):
                        value = scaled[column] / norm
                        sums[task, column] += value * value
            coming += has_gradient


@njit(nogil=True, cache=True, parallel=True, error_model="numpy")
def _move(weight: Any, halves: Any, of: Any, columns: Any, threshold: Any, size: Any) -> None:
    for task in prange((of.stop - of.start + _ROWS_PER_TASK - 1) // _ROWS_PER_TASK):
        first = of.start + np.int64(task) * _ROWS_PER_TASK
        out, scaled = np.empty(columns.size, of.state.dtype), np.empty(columns.size)
        work = np.empty((1, columns.size), of.state.dtype)
        coming = np.searchsorted(of.rows, first)
        for row in range(first, min(first + _ROWS_PER_TASK, of.stop)):
            has_gradient = coming < of.rows.size and of.rows[coming] == row
            if of.last_step[row] > 0:
                norm = _scaled_row(of, row, coming if has_gradient else -1, columns, threshold, out, scaled)
                if norm > 0.0:
                    load_row(weight, halves, row, work)
                    for column in range(columns.size):
                        work[0, column] -= of.state.dtype.type(size * (scaled[column] / norm))
                    store_row(weight, halves, row, work)
            coming += has_gradient
