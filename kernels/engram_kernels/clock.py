"""Which rows are hot: places for a fixed number of rows, given to the rows that are used (the CLOCK algorithm).

A hand goes round over the places. It takes that of the first row whose count of uses has gone down to zero, and takes
one off every other count that it passes; a use adds one, up to `MOST_USES`. So a row that is used in many steps stays
through several rounds, while one that was used once goes when the hand first comes by (Smith, "Sequentiality and
Prefetching in Database Systems", TODS 1978, calls it the generalized clock). The result depends on the order of the
rows only.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

MOST_USES = 15
_IN_USE = 128  # beside the count: the row is one of this call, so its place must not be taken


class Admitted(NamedTuple):
    """For each row of a call its place, int64 [k]; the row that had to leave it, int64 [k], -1 where none had; and
    whether it is new there, bool [k]."""

    places: NDArray[np.int64]
    left: NDArray[np.int64]
    is_new: NDArray[np.bool_]


class Clock:
    """The places of `place_of` int32 [rows] (place + 1, 0: none), whose rows are `row_at` int64 [places] (row + 1, 0:
    free), used `uses` uint8 [places] times; all zero at the start. They may be views of memory that others read."""

    def __init__(self, place_of: NDArray[np.int32], row_at: NDArray[np.int64], uses: NDArray[np.uint8]) -> None:
        self.place_of, self.row_at, self.uses = place_of, row_at, uses
        self._hand = 0

    def admit(self, rows: NDArray[np.int64]) -> Admitted:
        """Count a use of each of `rows` int64 [k], all different, and give those a place that have none; k must not
        exceed the number of places."""
        assert rows.size <= self.row_at.size, (rows.size, self.row_at.size)
        *admitted, self._hand = _admit(self.place_of, self.row_at, self.uses, rows, self._hand)
        return Admitted(*admitted)


@njit(nogil=True, cache=True)
def _admit(place_of: Any, row_at: Any, uses: Any, rows: Any, hand: Any) -> Any:
    places, left = np.empty(rows.size, np.int64), np.full(rows.size, -1, np.int64)
    is_new = np.zeros(rows.size, np.bool_)
    for i in range(rows.size):
        place = np.int64(place_of[rows[i]]) - 1
        places[i], is_new[i] = place, place < 0
        if place >= 0:
            uses[place] = min(uses[place] + 1, MOST_USES) | _IN_USE
    for i in range(rows.size):
        if is_new[i]:
            while row_at[hand] > 0 and uses[hand] > 0:
                if uses[hand] < _IN_USE:
                    uses[hand] -= 1
                hand = (hand + 1) % row_at.size
            left[i] = row_at[hand] - 1
            if left[i] >= 0:
                place_of[left[i]] = 0
            places[i], place_of[rows[i]] = hand, hand + 1
            row_at[hand], uses[hand] = rows[i] + 1, _IN_USE
            hand = (hand + 1) % row_at.size
    for i in range(rows.size):
        uses[places[i]] &= _IN_USE - 1
    return places, left, is_new, hand
