"""Sum of rows into those that an index names, in a fixed order, over any number of calls."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba import njit, prange
from numpy.typing import NDArray


def scatter_add_rows(
    out: NDArray[Any], is_begun: NDArray[np.bool_], index: NDArray[np.int64], rows: NDArray[Any]
) -> None:
    """out[index[i]] += rows[i] for i = 0, 1, ... one after another: bit-identical whatever the number of threads.

    `out` [u, d], `rows` [n, d] of one dtype, `index` int64 [n] within 0 .. u - 1. A row of `out` is written where
    `is_begun` [u] is false, which then becomes true: so `out` need not be filled with zeros first.
    """
    assert rows.shape == (index.size, out.shape[1]), (rows.shape, index.shape, out.shape)
    assert is_begun.shape == (out.shape[0],), (is_begun.shape, out.shape)
    _scatter_add(out, is_begun, index, rows, min(numba.get_num_threads(), max(1, index.size // 256)))


@njit(cache=True, parallel=True, nogil=True)
def _scatter_add(out: Any, is_begun: Any, index: Any, rows: Any, num_parts: int) -> None:
    # Each part owns a range of `out` and passes over the whole index: cheap beside the rows, and free of races.
    for part in prange(num_parts):
        start = out.shape[0] * part // num_parts
        stop = out.shape[0] * (part + 1) // num_parts
        for i in range(index.size):
            place = index[i]
            if start <= place < stop:
                if is_begun[place]:
                    for column in range(out.shape[1]):
                        out[place, column] += rows[i, column]
                else:
                    is_begun[place] = True
                    for column in range(out.shape[1]):
                        out[place, column] = rows[i, column]
