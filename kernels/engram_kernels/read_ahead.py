"""Asking the kernel for pages of a file before they are needed, many at once: a disk serves them side by side."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from numba import njit, types
from numpy.typing import NDArray

PAGE_BYTES = 4096

# By its name in the C library, so that the loop that calls it can be compiled, cached and run without Python's lock.
_fadvise = types.ExternalFunction(
    "posix_fadvise", types.int32(types.int32, types.int64, types.int64, types.int32)
)  # descriptor, first byte, number of bytes, advice


def read_ahead(descriptor: int, rows: NDArray[np.int64], record_bytes: int) -> None:
    """Have the kernel read the pages in which `rows` int64 [k] of a file lie, records of `record_bytes` one after
    another. Returns before they are there; it is a hint, and what is in memory already costs next to nothing.

    Rows that rise let neighbours share a request.
    """
    _read_ahead(np.int32(descriptor), rows, np.int64(record_bytes), np.int32(os.POSIX_FADV_WILLNEED))


@njit(nogil=True, cache=True)
def _read_ahead(descriptor: Any, rows: Any, record_bytes: Any, advice: Any) -> None:
    if rows.size == 0:
        return
    start = end = rows[0] * record_bytes  # the request that is being put together
    for i in range(rows.size):
        first = rows[i] * record_bytes // PAGE_BYTES * PAGE_BYTES
        if not start <= first <= end and end > start:
            _fadvise(descriptor, start, end - start, advice)
            start = end = first
        end = max(end, (rows[i] + 1) * record_bytes)
    _fadvise(descriptor, start, end - start, advice)
