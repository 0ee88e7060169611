"""Sum of rows that belong to the same key, in a fixed order."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, prange
from numpy.typing import NDArray


def sum_by_row(keys: NDArray[np.int64], values: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """The distinct keys, rising [u], and per key the sum of its rows of `values` [n, d] -> [u, d].

    Each sum runs in the order in which its rows stand in `values`, whatever the number of threads, so repeats are
    bit-identical.
    """
    if keys.size == 0:
        return keys.copy(), values.copy()
    order = np.argsort(keys, kind="stable")
    sorted_keys = keys[order]
    is_first = np.concatenate(([True], sorted_keys[1:] != sorted_keys[:-1]))
    starts = np.append(np.flatnonzero(is_first), keys.size)
    sums = np.empty((starts.size - 1, values.shape[1]), values.dtype)
    _sum_segments(values, order, starts, sums)
    return sorted_keys[is_first], sums


@njit(cache=True, parallel=True)
def _sum_segments(values: Any, order: Any, starts: Any, sums: Any) -> None:
    for s in prange(starts.size - 1):
        sums[s] = values[order[starts[s]]]
        for i in range(starts[s] + 1, starts[s + 1]):
            row = values[order[i]]
            for column in range(row.size):
                sums[s, column] += row[column]
