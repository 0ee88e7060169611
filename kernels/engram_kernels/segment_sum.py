"""Sum of rows that belong to the same key, in a fixed order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numba import carray, njit, prange, types
from numba.extending import intrinsic
from numpy.typing import NDArray

from engram_kernels.prefetch import prefetch_bytes
from engram_kernels.unique_rows import RowGroups, group_rows

Empty = Callable[[tuple[int, ...], Any], NDArray[Any]]  # as np.empty

_ROWS_AHEAD = 6
_SUMS_PER_TASK = 256


class RowSums(NamedTuple):
    """`rows` int64 [U], strictly rising; `sums` [U, D]; `squared_norms` float64 [U], sum(sums[u]^2)."""

    rows: NDArray[np.int64]
    sums: NDArray[Any]
    squared_norms: NDArray[np.float64]


def sum_pieces(keys: NDArray[np.int64], pieces: Sequence[NDArray[Any]], empty: Empty = np.empty) -> RowSums:
    """The distinct keys, rising, and per key the sum of its rows of `pieces` [n_i, D], end to end, not copied.

    `empty` makes the array of the sums.

    keys int64 [sum of n_i]; all pieces have one dtype, float32 or float64. Each sum runs in the order in which its rows
    stand in the pieces, whatever the number of threads, so repeats are bit-identical. The squared norms are computed in
    float64 from the sums in their dtype; add them up with `.sum()`, whose order is fixed too.
    """
    assert len(pieces) > 0, "the row width is unknown without a piece"
    pieces = [np.ascontiguousarray(piece) for piece in pieces]
    dtype, row_dim = pieces[0].dtype, pieces[0].shape[1]
    assert all((p.dtype, p.shape[1:]) == (dtype, (row_dim,)) for p in pieces), [(p.dtype, p.shape) for p in pieces]
    assert sum(map(len, pieces)) == keys.size, (list(map(len, pieces)), keys.size)
    return _sum_groups(group_rows(keys), pieces, empty)


def _sum_groups(groups: RowGroups, pieces: list[NDArray[Any]], empty: Empty) -> RowSums:
    row_bytes = pieces[0].strides[0] if pieces[0].size > 0 else pieces[0].shape[1] * pieces[0].itemsize
    addresses = np.concatenate([p.ctypes.data + np.arange(len(p), dtype=np.int64) * row_bytes for p in pieces])
    sums = empty((groups.rows.size, pieces[0].shape[1]), pieces[0].dtype)
    squared_norms = np.empty(groups.rows.size, np.float64)
    _sum_rows(addresses, groups.starts, groups.positions, sums, squared_norms)
    return RowSums(groups.rows, sums, squared_norms)


@njit(nogil=True, cache=True, parallel=True)
def _sum_rows(addresses: Any, starts: Any, positions: Any, sums: Any, squared_norms: Any) -> None:
    num_sums, row_dim = sums.shape
    row_bytes = row_dim * sums.itemsize
    for task in prange((num_sums + _SUMS_PER_TASK - 1) // _SUMS_PER_TASK):
        first = np.int64(task) * _SUMS_PER_TASK
        for s in range(first, min(first + _SUMS_PER_TASK, num_sums)):
            for i in range(starts[s], starts[s + 1]):
                if i + _ROWS_AHEAD < positions.size:
                    prefetch_bytes(addresses[positions[i + _ROWS_AHEAD]], row_bytes)
                row = carray(_pointer(addresses[positions[i]], sums), row_dim)
                if i == starts[s]:
                    for column in range(row_dim):
                        sums[s, column] = row[column]
                else:
                    for column in range(row_dim):
                        sums[s, column] += row[column]
            squared_norms[s] = _squared_norm(sums, s)


# Reassociation lets the compiler add in vectors: in an order that is fixed when it compiles, not by the data.
@njit(nogil=True, cache=True, fastmath={"reassoc", "nsz"})
def _squared_norm(sums: Any, s: Any) -> Any:
    total = 0.0
    for column in range(sums.shape[1]):
        value = np.float64(sums[s, column])
        total += value * value
    return total


@intrinsic
def _pointer(typing_context: Any, address: Any, like: Any) -> Any:
    """Pointer to numbers of `like`'s dtype at a byte address."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    assert isinstance(like, types.Array)
    return types.CPointer(like.dtype)(types.intp, like), generate
