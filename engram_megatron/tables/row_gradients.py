"""What one step's backward says about a shard's rows; made by the gather, consumed by the optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram_kernels.segment_sum import Empty, sum_pieces


@dataclass(frozen=True, eq=False)
class RowGradients:
    """Gradients of the rows of one shard that any rank used in a step, each summed over all ranks.

    `local_rows` int64 [n], strictly rising; `gradients` [n, row_dim] float32 (float64 of a float64 table);
    `squared_norms` float64 [n] of each row's gradient.
    """

    local_rows: NDArray[np.int64]
    gradients: NDArray[Any]
    squared_norms: NDArray[np.float64]

    @classmethod
    def summed(
        cls, local_rows: NDArray[np.int64], pieces: Sequence[NDArray[Any]], empty: Empty = np.empty
    ) -> RowGradients:
        """Of `pieces` [n_i, row_dim], put one after another the gradients of `local_rows` int64 [sum of n_i], in which
        rows may repeat: each row's are added in that order. `empty` makes the array of the sums."""
        return cls(*sum_pieces(local_rows, pieces, empty))

    @property
    def norm_squared(self) -> float:
        """Sum of squares of all gradients, in a fixed order."""
        return float(self.squared_norms.sum())
