"""Adam on one shard of the tables, equal to `torch.optim.Adam` on the whole table as one dense weight.

Dense Adam moves a row with live moments in every step, whether the step used it or not. Here a step costs what the rows
with a gradient cost: `engram_kernels.catch_up` says how the others get what they missed, exactly. A step that uses much
of the table moves all of it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram_kernels.catch_up import CatchUp
from engram_kernels.row_adam import is_for_sweep, sweep_rows, update_rows
from engram_megatron.optimizer.row_optimizer import LastUpdate, UpdateSample
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
        self.last_update = LastUpdate()

    @property
    def rule(self) -> str:
        return "touched" if self.touched_only else "dense"

    @property
    def read_as_of(self) -> CatchUp | None:
        """None with touched rows only: the others have nothing to catch up."""
        return None if self.touched_only else self.catch_up

    @property
    def learning_rates(self) -> NDArray[np.float64]:
        return self.catch_up.learning_rates[1:]

    @property
    def step_count(self) -> int:
        return self.catch_up.step

    def restore(self, learning_rates: NDArray[np.float64]) -> None:
        self.catch_up.replay(learning_rates)

    def step(self, row_gradients: RowGradients, lr: float, gradient_scale: float = 1.0) -> None:
        """As of `RowOptimizer`; not collective."""
        local_rows = row_gradients.local_rows
        sample = UpdateSample(self.shard, local_rows, self.read_as_of)
        self.shard.touch(local_rows)
        self._move(local_rows, row_gradients.gradients, lr, gradient_scale)
        self.catch_up.advance(lr)
        self.last_update = sample.after()

    def _move(self, local_rows: NDArray[np.int64], gradients: NDArray[Any], lr: float, scale: float) -> None:
        shard, catch_up = self.shard, self.catch_up
        if not self.touched_only and is_for_sweep(local_rows.size, shard.touched_rows, shard.num_rows):
            for part in shard.sweeping(local_rows):
                sweep_rows(part.table, part.places, gradients[part.order], catch_up, lr, scale)
            return
        for part in shard.updating(local_rows):
            update_rows(
                part.table,
                part.places,
                gradients[part.order],
                catch_up,
                lr,
                scale,
                touched_only=self.touched_only,
            )
