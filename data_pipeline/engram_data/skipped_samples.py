"""Positions of the order of samples that a run leaves out.

A *window* is a half-open range of positions. With windows, sample n of a run (from 0, over all its steps) stands at the
n-th position that lies in none of them: every step still has a whole batch, and what comes before a window stays as it
was.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

Windows = tuple[tuple[int, int], ...]  # (first position, the one behind the last); disjoint and rising


def union(windows: Iterable[Sequence[int]]) -> Windows:
    """The same positions as windows that neither overlap nor touch, in their order."""
    merged: list[tuple[int, int]] = []
    for first, stop in sorted((int(first), int(stop)) for first, stop in windows):
        assert 0 <= first < stop, (first, stop)
        if merged and first <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], stop)
        else:
            merged.append((first, stop))
    return tuple(merged)


def positions_of(numbers: NDArray[np.integer], windows: Windows) -> NDArray[np.int64]:
    """Positions of the samples `numbers` (any shape, >= 0) of a run that leaves out `windows`."""
    positions: NDArray[np.int64] = numbers.astype(np.int64)
    for first, stop in windows:
        positions = np.where(positions >= first, positions + (stop - first), positions)
    return positions


def samples_before(position: int, windows: Windows) -> int:
    """How many samples such a run has read when it comes to `position`."""
    return position - sum(min(stop, position) - first for first, stop in windows if first < position)


def has_read(num_samples: int, windows: Windows, other: Iterable[Sequence[int]]) -> bool:
    """Whether the first `num_samples` samples of a run that leaves out `windows` have one in `other`."""
    return any(
        samples_before(first, windows) < min(num_samples, samples_before(stop, windows)) for first, stop in other
    )
