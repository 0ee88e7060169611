"""Places for hot rows against the algorithm in plain Python, and what it promises."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from engram_kernels.clock import MOST_USES, Clock

ROWS = 30


def _clock(places: int, rows: int = ROWS) -> Clock:
    return Clock(np.zeros(rows, np.int32), np.zeros(places, np.int64), np.zeros(places, np.uint8))


class _Plain:
    """The same with lists; -1 in `rows`: free."""

    def __init__(self, places: int) -> None:
        self.rows, self.uses, self.hand = [-1] * places, [0] * places, 0

    def admit(self, wanted: list[int]) -> tuple[list[int], list[int], list[bool]]:
        known = [row in self.rows for row in wanted]
        for row in set(wanted) & set(self.rows):
            place = self.rows.index(row)
            self.uses[place] = min(self.uses[place] + 1, MOST_USES)
        left = []
        for row in wanted:
            if row in self.rows:
                left.append(-1)
                continue
            while self.rows[self.hand] in wanted or self.uses[self.hand] > 0:
                if self.rows[self.hand] not in wanted:
                    self.uses[self.hand] -= 1
                self._turn()
            left.append(self.rows[self.hand])
            self.rows[self.hand], self.uses[self.hand] = row, 0
            self._turn()
        return [self.rows.index(row) for row in wanted], left, [not one for one in known]

    def _turn(self) -> None:
        self.hand = (self.hand + 1) % len(self.rows)


@settings(deadline=None, max_examples=200)  # the first example compiles the kernel
@given(
    st.integers(1, 12), st.lists(st.lists(st.integers(0, ROWS - 1), unique=True, max_size=12), min_size=1, max_size=20)
)
def test_equals_plain_python(places: int, steps: list[list[int]]) -> None:
    clock, plain = _clock(places), _Plain(places)
    for step in steps:
        wanted = step[:places]
        admitted, expected = clock.admit(np.array(wanted, np.int64)), plain.admit(wanted)
        for ours, theirs in zip(admitted, expected, strict=True):
            assert ours.tolist() == theirs
        assert (clock.row_at - 1).tolist() == plain.rows
        assert clock.uses.tolist() == plain.uses
        assert (clock.place_of[clock.row_at[clock.row_at > 0] - 1] == np.flatnonzero(clock.row_at) + 1).all()
        assert np.count_nonzero(clock.place_of) == np.count_nonzero(clock.row_at)


def test_rows_of_one_call_never_push_each_other_out() -> None:
    clock = _clock(10)
    for first in (0, 5, 15, 20, 0):
        rows = np.arange(first, first + 10)
        assert sorted(clock.admit(rows).places.tolist()) == list(range(10))


def test_row_that_is_used_often_outlives_many_that_are_used_once() -> None:
    clock = _clock(10, 10_000)
    once = iter(range(1, 10_000))
    for _ in range(20):
        clock.admit(np.array([0, next(once)]))
    for _ in range(10 * 10):  # ten rounds of the hand, in which nobody uses row 0
        clock.admit(np.array([next(once)]))
    assert clock.place_of[0] > 0
    for _ in range(10 * MOST_USES):
        clock.admit(np.array([next(once)]))
    assert clock.place_of[0] == 0
