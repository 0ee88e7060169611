"""Copies of table rows at random places: bound by the latency of memory, so each row is asked for some rows ahead."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, prange
from numpy.typing import NDArray

from engram_kernels.prefetch import prefetch_bytes

ROWS_AHEAD = 8
_ROWS_PER_TASK = 512


def gather_rows(
    weight: NDArray[Any], rows: NDArray[np.int64], out: NDArray[Any], places: NDArray[np.int64] | None = None
) -> None:
    """out[i] = weight[rows[i]], or out[places[i]] = weight[rows[i]].

    weight [n, D] and out [k, D] of one dtype, rows and places int64 [k]; no two places may be equal.
    Raises `IndexError` for a row outside the table.
    """
    check_rows(rows, len(weight))
    check_output(weight, rows, out, places)
    _gather(weight, rows, out, places)


def check_rows(rows: NDArray[np.int64], num_rows: int) -> None:
    """Raise `IndexError` where one of `rows` is not in 0 .. num_rows - 1."""
    assert rows.dtype == np.int64, rows.dtype
    assert rows.ndim == 1, rows.shape
    if rows.size == 0:
        return
    lowest, highest = _bounds(rows)
    if lowest < 0 or highest >= num_rows:
        wrong = lowest if lowest < 0 else highest
        raise IndexError(f"row {wrong} is outside a table of {num_rows} rows")


def check_output(
    weight: NDArray[Any], rows: NDArray[np.int64], out: NDArray[Any], places: NDArray[np.int64] | None
) -> None:
    """Assert that `out` can take the rows of `weight`, at `places` if given."""
    assert (out.dtype, out.shape[1:]) == (weight.dtype, weight.shape[1:]), (out.dtype, out.shape, weight.shape)
    if places is None:
        assert len(out) == rows.size, (len(out), rows.size)
    elif rows.size > 0:
        assert places.shape == rows.shape, (places.shape, rows.shape)
        assert places.dtype == np.int64, places.dtype
        lowest, highest = _bounds(places)
        assert lowest >= 0, lowest
        assert highest < len(out), (highest, len(out))


@njit(nogil=True, cache=True)
def _bounds(values: Any) -> Any:
    lowest, highest = values[0], values[0]
    for i in range(values.size):
        lowest, highest = min(lowest, values[i]), max(highest, values[i])
    return lowest, highest


@njit(nogil=True, cache=True, parallel=True)
def _gather(weight: Any, rows: Any, out: Any, places: Any) -> None:
    row_dim = weight.shape[1]
    row_bytes = row_dim * weight.itemsize
    base = np.intp(weight.ctypes.data)
    for task in prange((rows.size + _ROWS_PER_TASK - 1) // _ROWS_PER_TASK):
        start = np.int64(task) * _ROWS_PER_TASK
        for i in range(start, min(start + _ROWS_PER_TASK, rows.size)):
            if i + ROWS_AHEAD < rows.size:
                prefetch_bytes(base + rows[i + ROWS_AHEAD] * row_bytes, row_bytes)
            row = rows[i]
            if places is None:
                place = i
            else:
                place = places[i]
            for column in range(row_dim):
                out[place, column] = weight[row, column]
