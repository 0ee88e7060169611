"""Who is told which rows of a shard an update is about to change."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class UpdateObserver(Protocol):
    """Hears of every update of a `TableShard` (its `observer`) before it changes anything."""

    def before_update(self, local_rows: NDArray[np.int64], *, sweep: bool) -> None:
        """`local_rows` int64 [n], strictly rising, change when this returns; with `sweep` also all rows that ever had a
        gradient."""
