"""Samples that a run leaves out: the others follow in their order, each once, for any number of ranks."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from engram_data.skipped_samples import Windows, has_read, positions_of, samples_before, union

LENGTH = 60


def random_windows(chance: random.Random) -> Windows:
    borders = [sorted(chance.sample(range(LENGTH), 2)) for _ in range(chance.randrange(4))]
    return union(borders)


@pytest.mark.parametrize(
    ("windows", "expected"),
    [
        ([], ()),
        ([(8, 9), (2, 4)], ((2, 4), (8, 9))),
        ([(2, 4), (4, 6)], ((2, 6),)),
        ([(2, 9), (3, 5), [8, 12]], ((2, 12),)),
    ],
)
def test_union(windows: list[tuple[int, int]], expected: Windows) -> None:
    assert union(windows) == expected


@pytest.mark.parametrize("seed", range(20))
def test_positions_are_those_that_are_in_no_window(seed: int) -> None:
    windows = random_windows(random.Random(seed))
    left = [place for place in range(LENGTH) if not any(first <= place < stop for first, stop in windows)]
    assert positions_of(np.arange(len(left)), windows).tolist() == left
    assert positions_of(np.arange(6).reshape(2, 3), ()).tolist() == [[0, 1, 2], [3, 4, 5]]
    for position in range(LENGTH):
        assert samples_before(position, windows) == sum(place < position for place in left)


@pytest.mark.parametrize("seed", range(20))
def test_more_windows_change_nothing_of_what_was_read_exactly_if_none_of_it_lies_in_them(seed: int) -> None:
    chance = random.Random(seed)
    windows, more = random_windows(chance), random_windows(chance)
    for count in range(30):
        numbers = np.arange(count)
        before = positions_of(numbers, windows)
        same = np.array_equal(before, positions_of(numbers, union(itertools.chain(windows, more))))
        assert has_read(count, windows, more) != same
