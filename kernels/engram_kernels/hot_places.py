"""Which rows are hot: places for a fixed number of rows, kept by those that are used most often.

Every row has a count of its uses, in a place or not. A row that needs a place gets that of the least used among the
next `SAMPLE` rows of a hand that goes round, which finds nearly the least used of all (sampled LFU, as in Redis). After
`USES_PER_PLACE` uses per place all counts are halved, so that rows that are used no more grow cold (the window of
TinyLFU: Einziger, Friedman, Manes, ACM TOS 2017). Measured beside CLOCK, which forgets a row that leaves its place, in
docs/results/2026-11-25-tables.md.

The result depends on nothing but the rows and their order.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

SAMPLE = 8
USES_PER_PLACE = 16
MOST_USES = 127
_IN_USE = 128  # beside the count: the row is one of this call, so its place must not be taken


class Admitted(NamedTuple):
    """For each row of a call its place, int64 [k]; the row that had to leave it, int64 [k], -1 where none had; and
    whether it is new there, bool [k]."""

    places: NDArray[np.int64]
    left: NDArray[np.int64]
    is_new: NDArray[np.bool_]


class HotPlaces:
    """Places of rows. All arrays are zero at the start; they may be views of memory that others read.

    Of every row: `place_of` int32 [n], its place + 1 or 0; `past_uses` uint8 [n], its count when it left its place. Of
    every place: `row_at` int64 [p], its row + 1 or 0; `uses` uint8 [p], that row's count.
    """

    def __init__(
        self,
        place_of: NDArray[np.int32],
        past_uses: NDArray[np.uint8],
        row_at: NDArray[np.int64],
        uses: NDArray[np.uint8],
    ) -> None:
        self.place_of, self.past_uses, self.row_at, self.uses = place_of, past_uses, row_at, uses
        self._hand = 0
        self._uses_counted = 0  # since counts were halved

    def admit(self, rows: NDArray[np.int64]) -> Admitted:
        """Count a use of each of `rows` int64 [k], all different, and give those a place that have none; k must not
        exceed the number of places."""
        assert rows.size <= self.row_at.size, (rows.size, self.row_at.size)
        *admitted, self._hand = _admit(self.place_of, self.past_uses, self.row_at, self.uses, rows, self._hand)
        self._uses_counted += rows.size
        if self._uses_counted > USES_PER_PLACE * self.row_at.size:
            self._uses_counted = 0
            self.uses >>= 1
            self.past_uses >>= 1
        return Admitted(*admitted)


@njit(nogil=True, cache=True)
def _admit(place_of: Any, past_uses: Any, row_at: Any, uses: Any, rows: Any, hand: Any) -> Any:
    places, left = np.empty(rows.size, np.int64), np.full(rows.size, -1, np.int64)
    is_new = np.zeros(rows.size, np.bool_)
    for i in range(rows.size):
        place = np.int64(place_of[rows[i]]) - 1
        places[i], is_new[i] = place, place < 0
        if place >= 0:
            uses[place] = min(uses[place] + 1, MOST_USES) | _IN_USE
    for i in range(rows.size):
        if is_new[i]:
            place, hand = _least_used(row_at, uses, hand)
            if row_at[place] > 0:
                left[i] = row_at[place] - 1
                place_of[left[i]] = 0
                past_uses[left[i]] = uses[place]
            row_at[place] = rows[i] + 1
            place_of[rows[i]] = place + 1
            uses[place] = min(past_uses[rows[i]] + 1, MOST_USES) | _IN_USE
            places[i] = place
    for i in range(rows.size):
        uses[places[i]] &= _IN_USE - 1
    return places, left, is_new, hand


@njit(nogil=True, cache=True)
def _least_used(row_at: Any, uses: Any, hand: Any) -> Any:
    """A free place, or that of the least used of the next rows that are not in use; and where the hand goes on."""
    found, seen = -1, 0
    for _ in range(row_at.size):
        here = hand
        hand = (hand + 1) % row_at.size
        if row_at[here] == 0:
            return here, hand
        if uses[here] < _IN_USE:
            found = here if found < 0 or uses[here] < uses[found] else found
            seen += 1
            if seen == SAMPLE:
                break
    return found, hand
