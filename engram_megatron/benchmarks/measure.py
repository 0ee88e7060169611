"""Timing of several candidates in turns, and the table of their ratios."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

Candidate = Callable[[], object]


@dataclass(frozen=True)
class Comparison:
    """One row of a table: the time of our code and that of what it is compared with, in seconds.

    `target` is the least ratio wanted (2.0: twice as fast); None where the row is only shown.
    """

    name: str
    ours_s: float
    reference_name: str
    reference_s: float
    target: float | None = None

    @property
    def ratio(self) -> float:
        """How many times as fast as the reference; above 1 we are faster."""
        return self.reference_s / self.ours_s

    @property
    def verdict(self) -> str:
        """`ok`, `short` of the target, or `-` without one."""
        if self.target is None:
            return "-"
        return "ok" if self.ratio >= self.target else "short"


def interleaved(
    candidates: Mapping[str, Candidate],
    repeats: int,
    prepare: Mapping[str, Candidate] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Median seconds of each candidate over `repeats` rounds, after one round of warm-up.

    Every round calls each candidate once, in turn and from a moving start, so that a machine that slows down for a
    while, and the cache that the one before left behind, are shared by all. `prepare[name]` runs before each call of
    that candidate and is not timed. `clock` may be `time.process_time` for candidates that run on one thread, where
    other programs share the cores.
    """
    assert repeats > 0, repeats
    names = list(candidates)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    collects = gc.isenabled()
    gc.disable()  # a collection would be charged to whoever allocates next
    try:
        for turn in range(repeats + 1):
            start = turn % len(names)
            for name in names[start:] + names[:start]:
                if prepare is not None and name in prepare:
                    prepare[name]()
                begin = clock()
                result = candidates[name]()
                elapsed = clock() - begin
                del result  # outside of the timing
                if turn > 0:
                    seconds[name].append(elapsed)
    finally:
        if collects:
            gc.enable()
    return {name: statistics.median(values) for name, values in seconds.items()}


def table(comparisons: Sequence[Comparison]) -> str:
    """The comparisons as aligned text: name, our time, what with and its time, ratio, target, verdict."""
    header = ("name", "ours", "compared with", "its time", "ratio", "target", "verdict")
    rows = [header] + [
        (
            c.name,
            duration(c.ours_s),
            c.reference_name,
            duration(c.reference_s),
            f"{c.ratio:.2f}",
            "-" if c.target is None else f"{c.target:.2f}",
            c.verdict,
        )
        for c in comparisons
    ]
    return aligned(rows, words={0, 2, 6})


def aligned(rows: Sequence[Sequence[str]], words: Collection[int]) -> str:
    """Cells in columns, a line for each of `rows`. Columns of `words`, counted from 0, stand left, numbers right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column in words else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def duration(seconds: float) -> str:
    """Seconds in a unit that leaves three digits before the point at most."""
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if seconds * factor >= 1.0:
            return f"{seconds * factor:.3g} {unit}" if seconds * factor < 100 else f"{seconds * factor:.0f} {unit}"
    return f"{seconds * 1e9:.0f} ns"
