"""Places for hot rows against the rule in plain Python, and what it promises."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from engram_kernels.hot_places import MOST_USES, SAMPLE, USES_PER_PLACE, HotPlaces

ROWS = 30


def _hot_places(places: int, rows: int = ROWS) -> HotPlaces:
    of_rows, of_places = (rows, np.uint8), (places, np.uint8)
    return HotPlaces(np.zeros(rows, np.int32), np.zeros(*of_rows), np.zeros(places, np.int64), np.zeros(*of_places))


class _Plain:
    """The same with one count per row; -1 in `rows`: free."""

    def __init__(self, places: int) -> None:
        self.rows, self.uses, self.hand, self.counted = [-1] * places, [0] * ROWS, 0, 0

    def admit(self, wanted: list[int]) -> tuple[list[int], list[int], list[bool]]:
        is_new = [row not in self.rows for row in wanted]
        for row in wanted:
            self.uses[row] = min(self.uses[row] + 1, MOST_USES)
        left = [self._bring_in(row, wanted) for row in wanted]
        self.counted += len(wanted)
        if self.counted > USES_PER_PLACE * len(self.rows):
            self.counted, self.uses = 0, [uses // 2 for uses in self.uses]
        return [self.rows.index(row) for row in wanted], left, is_new

    def _bring_in(self, row: int, wanted: list[int]) -> int:
        """The row that had to leave for `row`."""
        if row in self.rows:
            return -1
        candidates: list[int] = []
        for _ in self.rows:
            here, self.hand = self.hand, (self.hand + 1) % len(self.rows)
            if self.rows[here] == -1:
                candidates = [here]
                break
            candidates += [here] if self.rows[here] not in wanted else []
            if len(candidates) == SAMPLE:
                break
        place = min(candidates, key=lambda here: self.uses[self.rows[here]])
        left, self.rows[place] = self.rows[place], row
        return left


@settings(deadline=None, max_examples=300)  # the first example compiles the kernel
@given(
    st.integers(1, 12), st.lists(st.lists(st.integers(0, ROWS - 1), unique=True, max_size=12), min_size=1, max_size=60)
)
def test_equals_plain_python(places: int, steps: list[list[int]]) -> None:
    hot, plain = _hot_places(places), _Plain(places)
    for step in steps:
        wanted = step[:places]
        admitted, expected = hot.admit(np.array(wanted, np.int64)), plain.admit(wanted)
        for ours, theirs in zip(admitted, expected, strict=True):
            assert ours.tolist() == theirs
        assert (hot.row_at - 1).tolist() == plain.rows
        counts = np.where(hot.place_of > 0, hot.uses[hot.place_of - 1], hot.past_uses)
        assert counts.tolist() == plain.uses
        np.testing.assert_array_equal(np.flatnonzero(hot.place_of), np.sort(hot.row_at[hot.row_at > 0] - 1))


def test_rows_of_one_call_never_push_each_other_out() -> None:
    hot = _hot_places(10)
    for first in (0, 5, 15, 20, 0):
        assert sorted(hot.admit(np.arange(first, first + 10)).places.tolist()) == list(range(10))


def test_row_that_is_used_often_outlives_rows_that_are_used_once_until_it_is_used_no_more() -> None:
    hot = _hot_places(100, 100_000)
    once = iter(range(1, 100_000))
    for _ in range(50):
        hot.admit(np.array([0, next(once)]))
    for _ in range(USES_PER_PLACE * 100 - 150):  # many rounds of the hand
        hot.admit(np.array([next(once)]))
    assert hot.place_of[0] > 0
    for _ in range(USES_PER_PLACE * 100 * 7):  # its count is halved seven times
        hot.admit(np.array([next(once)]))
    assert hot.place_of[0] == 0


def test_counts_stop_at_the_most_that_they_can_hold() -> None:
    hot = _hot_places(20)
    for _ in range(2 * MOST_USES):
        hot.admit(np.array([3]))
    assert hot.uses[hot.place_of[3] - 1] == MOST_USES
