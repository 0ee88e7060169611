"""Adam on one shard of the tables, equal to `torch.optim.Adam` on the whole table as one dense weight.

Dense Adam moves a row with live moments in every step, whether the step used it or not. Here a step costs what the rows
with a gradient cost: `engram_kernels.catch_up` says how the others get what they missed, exactly.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, prange

from engram_kernels.catch_up import CatchUp
from engram_kernels.row_adam import update_rows
from engram_megatron.tables.row_gradients import RowGradients
from engram_megatron.tables.table_shard import TableShard


class RowAdam:
    """The optimizer of `shard`; its state lives in the shard's rows and in `catch_up`, which this rank's readers of
    rows share. `touched_only`: a row that a step does not use stays as it is, its moments too, as in
    `torch.optim.SparseAdam`."""

    def __init__(self, shard: TableShard, catch_up: CatchUp, *, touched_only: bool = False) -> None:
        self.shard = shard
        self.catch_up = catch_up
        self.touched_only = touched_only

    @property
    def read_as_of(self) -> CatchUp | None:
        """What rows are read as of (`TableShard.read`): with touched rows only, the others have nothing to catch up."""
        return None if self.touched_only else self.catch_up

    def step(self, row_gradients: RowGradients, lr: float, gradient_scale: float = 1.0) -> None:
        """Move the shard by one step of Adam with the gradients times `gradient_scale` (clipping, 1 / tokens).

        Rows that are not in `row_gradients` have a zero gradient. A step to be skipped is one not to call.
        """
        self.shard.make(row_gradients.local_rows)
        update_rows(
            self.shard.rows,
            row_gradients.local_rows,
            row_gradients.gradients,
            self.catch_up,
            lr,
            gradient_scale,
            touched_only=self.touched_only,
        )
        self.catch_up.advance(lr)

    def gradient_norm_squared(self, row_gradients: RowGradients) -> float:
        """Sum of squares of the unscaled gradients of this shard, in float64 and in a fixed order."""
        per_row = np.empty(row_gradients.local_rows.size, np.float64)
        _squared_norms(row_gradients.gradients, per_row)
        return float(per_row.sum())


@njit(cache=True, parallel=True, nogil=True)
def _squared_norms(gradients: Any, per_row: Any) -> None:
    for row in prange(per_row.size):
        total = 0.0
        for column in range(gradients.shape[1]):
            value = np.float64(gradients[row, column])
            total += value * value
        per_row[row] = total
