"""Rows with their records from one pair of arrays to another, of which either may lie in a file: faults of pages that
are not in memory run on all threads, and without Python's lock."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, prange
from numpy.typing import NDArray

from engram_kernels.gather_rows import check_rows

_ROWS_PER_TASK = 64


def copy_rows(
    source: tuple[NDArray[Any], NDArray[Any]],
    source_rows: NDArray[np.int64],
    target: tuple[NDArray[Any], NDArray[Any]],
    target_rows: NDArray[np.int64],
) -> None:
    """target[target_rows[i]] = source[source_rows[i]], bit for bit.

    A pair is (weight [n, D], state [n, S]) as `row_state` has them, each row contiguous, rows any distance apart. rows
    int64 [k]; no two target rows may be equal. Raises `IndexError` for a row outside its arrays.
    """
    assert source_rows.size == target_rows.size, (source_rows.size, target_rows.size)
    for (weight, state), rows in ((source, source_rows), (target, target_rows)):
        assert len(weight) == len(state), (len(weight), len(state))
        check_rows(rows, len(weight))
    for ours, theirs in zip(source, target, strict=True):
        assert (ours.dtype, ours.shape[1]) == (theirs.dtype, theirs.shape[1])
    if source_rows.size > 0:  # threads are not woken for nothing
        _copy(*map(_bits, source), source_rows, *map(_bits, target), target_rows)


def _bits(array: NDArray[Any]) -> NDArray[Any]:
    """As integers: remainders that lie among floats may look like a NaN, which must not be changed."""
    return array.view(f"u{array.itemsize}")


@njit(nogil=True, cache=True, parallel=True)
def _copy(
    source_weight: Any,
    source_state: Any,
    source_rows: Any,
    target_weight: Any,
    target_state: Any,
    target_rows: Any,
) -> None:
    for task in prange((source_rows.size + _ROWS_PER_TASK - 1) // _ROWS_PER_TASK):
        start = np.int64(task) * _ROWS_PER_TASK
        for i in range(start, min(start + _ROWS_PER_TASK, source_rows.size)):
            source, target = source_rows[i], target_rows[i]
            for column in range(source_weight.shape[1]):
                target_weight[target, column] = source_weight[source, column]
            for column in range(source_state.shape[1]):
                target_state[target, column] = source_state[source, column]
