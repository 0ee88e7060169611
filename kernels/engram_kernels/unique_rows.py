"""The distinct values of row ids, and where each stands: one radix sort of ids that carry their positions.

An id and its position share one int64, (id - lowest) << position bits | position, so that all keys differ, the sorted
order is unique whatever the number of threads, and the positions of one id come in order of appearance. Sorting by
digits of up to 14 bits takes two passes for tables of up to 2^28 rows, each of which reads and writes 8 bytes per id;
hashing the ids first saves nothing, because real text leaves most of them distinct.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
from numba import njit, prange
from numpy.typing import NDArray

Int64 = NDArray[np.int64]

KEY_BITS = 63
MAX_DIGIT_BITS = 14
_IDS_PER_CHUNK = 1 << 16  # the least that is worth a thread


@dataclass(frozen=True, eq=False)
class RowGroups:
    """Equal ids together: id `rows[u]` stands at `positions[starts[u] : starts[u + 1]]`, which rise.

    `rows` int64 [U], strictly rising; `starts` int64 [U + 1]; `positions` int64 [n].
    """

    rows: Int64
    starts: Int64
    positions: Int64


def unique_rows(ids: Int64) -> tuple[Int64, Int64]:
    """The distinct `ids` (int64 [n]), rising [U], and int64 [n] where each id stands there: `rows[inverse] == ids`.

    The same as `np.unique(ids, return_inverse=True)`.
    """
    keys, lowest, position_bits = _sorted_keys(ids)
    rows, inverse = np.empty(ids.size, np.int64), np.empty(ids.size, np.int64)
    count = _pick(ids.size, _write_inverse, _write_inverse_on_threads)(
        keys, lowest, position_bits, _num_chunks(ids.size), rows, inverse
    )
    return rows[:count], inverse


def group_rows(ids: Int64) -> RowGroups:
    """The groups of equal `ids` (int64 [n])."""
    keys, lowest, position_bits = _sorted_keys(ids)
    rows, starts = np.empty(ids.size, np.int64), np.empty(ids.size + 1, np.int64)
    positions = np.empty(ids.size, np.int64)
    count = _pick(ids.size, _write_groups, _write_groups_on_threads)(
        keys, lowest, position_bits, _num_chunks(ids.size), rows, starts, positions
    )
    starts[count] = ids.size
    return RowGroups(rows[:count], starts[: count + 1], positions)


def _num_chunks(num_ids: int) -> int:
    return max(1, min(int(numba.get_num_threads()), num_ids // _IDS_PER_CHUNK))


def _pick(num_ids: int, on_one_thread: Any, on_threads: Any) -> Any:
    """Waking threads for a few ids costs more than sorting them."""
    return on_threads if _num_chunks(num_ids) > 1 else on_one_thread


def _sorted_keys(ids: Int64) -> tuple[Int64, int, int]:
    """The keys of the module's docstring, rising, with the lowest id and the number of position bits."""
    assert ids.dtype == np.int64, ids.dtype
    assert ids.ndim == 1, ids.shape
    if ids.size == 0:
        return ids.copy(), 0, 0
    ids = np.ascontiguousarray(ids)
    lowest, highest = _bounds(ids)
    position_bits = int(ids.size - 1).bit_length()
    id_bits = (int(highest) - int(lowest)).bit_length()
    assert id_bits + position_bits <= KEY_BITS, f"{ids.size} ids from {lowest} to {highest} do not fit keys of 63 bits"
    # Counting 2^14 digits pays for ids in such numbers only.
    digit_bits = min(MAX_DIGIT_BITS, max(6, position_bits - 2))
    keys, other = np.empty(ids.size, np.int64), np.empty(ids.size, np.int64)
    sort = _pick(ids.size, _sort, _sort_on_threads)
    return (
        sort(ids, lowest, position_bits, id_bits, digit_bits, _num_chunks(ids.size), keys, other),
        lowest,
        position_bits,
    )


@njit(nogil=True, cache=True)
def _bounds(values: Any) -> Any:
    lowest, highest = values[0], values[0]
    for i in range(values.size):
        lowest, highest = min(lowest, values[i]), max(highest, values[i])
    return lowest, highest


def _sort_body(
    ids: Any, lowest: Any, position_bits: Any, id_bits: Any, digit_bits: Any, num_chunks: Any, keys: Any, other: Any
) -> Any:
    """Least digit first; every chunk of the ids counts its digits and moves its keys on its own."""
    num_passes = max(1, (id_bits + digit_bits - 1) // digit_bits)
    width = (id_bits + num_passes - 1) // num_passes
    mask = (1 << width) - 1
    size = (ids.size + num_chunks - 1) // num_chunks
    places = np.empty((num_chunks, mask + 1), np.int64)
    for number in range(num_passes):
        shift = position_bits + number * width
        for chunk in prange(num_chunks):
            start = np.int64(chunk) * size
            stop = min(start + size, ids.size)
            if number == 0:
                _make_keys(ids, lowest, position_bits, start, stop, keys)
            _count_digits(keys, shift, mask, start, stop, places[chunk])
        total = 0
        for digit in range(mask + 1):
            for chunk in range(num_chunks):
                count = places[chunk, digit]
                places[chunk, digit] = total
                total += count
        for chunk in prange(num_chunks):
            start = np.int64(chunk) * size
            _move_keys(keys, shift, mask, start, min(start + size, ids.size), places[chunk], other)
        keys, other = other, keys
    return keys


def _write_inverse_body(keys: Any, lowest: Any, position_bits: Any, num_chunks: Any, rows: Any, inverse: Any) -> Any:
    size = (keys.size + num_chunks - 1) // num_chunks
    firsts = np.empty(num_chunks, np.int64)
    for chunk in prange(num_chunks):
        start = np.int64(chunk) * size
        firsts[chunk] = _count_groups(keys, position_bits, start, min(start + size, keys.size))
    count = firsts.sum()
    firsts = np.cumsum(firsts) - firsts
    for chunk in prange(num_chunks):
        start = np.int64(chunk) * size
        group = firsts[chunk] - 1
        mask = (np.int64(1) << position_bits) - 1
        for i in range(start, min(start + size, keys.size)):
            if i == 0 or (keys[i] ^ keys[i - 1]) >> position_bits != 0:
                group += 1
                rows[group] = (keys[i] >> position_bits) + lowest
            inverse[keys[i] & mask] = group
    return count


def _write_groups_body(
    keys: Any, lowest: Any, position_bits: Any, num_chunks: Any, rows: Any, starts: Any, positions: Any
) -> Any:
    size = (keys.size + num_chunks - 1) // num_chunks
    firsts = np.empty(num_chunks, np.int64)
    for chunk in prange(num_chunks):
        start = np.int64(chunk) * size
        firsts[chunk] = _count_groups(keys, position_bits, start, min(start + size, keys.size))
    count = firsts.sum()
    firsts = np.cumsum(firsts) - firsts
    for chunk in prange(num_chunks):
        start = np.int64(chunk) * size
        group = firsts[chunk] - 1
        mask = (np.int64(1) << position_bits) - 1
        for i in range(start, min(start + size, keys.size)):
            if i == 0 or (keys[i] ^ keys[i - 1]) >> position_bits != 0:
                group += 1
                rows[group] = (keys[i] >> position_bits) + lowest
                starts[group] = i
            positions[i] = keys[i] & mask
    return count


@njit(nogil=True, cache=True)
def _make_keys(ids: Any, lowest: Any, position_bits: Any, start: Any, stop: Any, keys: Any) -> None:
    for i in range(start, stop):
        keys[i] = ((ids[i] - lowest) << position_bits) | i


@njit(nogil=True, cache=True)
def _count_digits(keys: Any, shift: Any, mask: Any, start: Any, stop: Any, counts: Any) -> None:
    counts[:] = 0
    for i in range(start, stop):
        counts[(keys[i] >> shift) & mask] += 1


@njit(nogil=True, cache=True)
def _move_keys(keys: Any, shift: Any, mask: Any, start: Any, stop: Any, places: Any, other: Any) -> None:
    for i in range(start, stop):
        digit = (keys[i] >> shift) & mask
        place = places[digit]
        places[digit] = place + 1
        other[place] = keys[i]


@njit(nogil=True, cache=True)
def _count_groups(keys: Any, position_bits: Any, start: Any, stop: Any) -> Any:
    count = 0
    for i in range(start, stop):
        if i == 0 or (keys[i] ^ keys[i - 1]) >> position_bits != 0:
            count += 1
    return count


_sort = njit(_sort_body, nogil=True, cache=True)
_sort_on_threads = njit(_sort_body, nogil=True, cache=True, parallel=True)
_write_inverse = njit(_write_inverse_body, nogil=True, cache=True)
_write_inverse_on_threads = njit(_write_inverse_body, nogil=True, cache=True, parallel=True)
_write_groups = njit(_write_groups_body, nogil=True, cache=True)
_write_groups_on_threads = njit(_write_groups_body, nogil=True, cache=True, parallel=True)
