"""Times next to the most that they may be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engram_megatron.benchmarks.measure import aligned, duration


@dataclass(frozen=True)
class Limited:
    """One row of a table. `limit_s` is None where the row only explains another one."""

    name: str
    measured_s: float
    limit_s: float | None = None

    @property
    def ratio(self) -> float | None:
        """Of the limit; above 1 the target is missed."""
        return None if self.limit_s is None else self.measured_s / self.limit_s

    @property
    def is_missed(self) -> bool:
        return self.ratio is not None and self.ratio > 1.0


def limits_table(rows: Sequence[Limited]) -> str:
    """The rows as aligned text: name, measured, limit, ratio, verdict."""
    cells = [("name", "measured", "limit", "ratio", "verdict")]
    for row in rows:
        limit, ratio, verdict = "-", "-", "-"
        if row.limit_s is not None and row.ratio is not None:
            limit, ratio, verdict = duration(row.limit_s), f"{row.ratio:.2f}", "missed" if row.is_missed else "ok"
        cells.append((row.name, duration(row.measured_s), limit, ratio, verdict))
    return aligned(cells, words={0, 4})
