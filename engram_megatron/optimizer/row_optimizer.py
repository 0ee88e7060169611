"""What an optimizer of table rows is, and what is watched of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from engram_kernels.catch_up import CatchUp
from engram_megatron.tables.row_gradients import RowGradients
from engram_megatron.tables.table_shard import TableShard

SAMPLED_ROWS = 1024


@dataclass(frozen=True)
class LastUpdate:
    """What the last step did on this shard: how many rows had a gradient, and the sums of squares of a sample's updates
    and weights."""

    rows: int = 0
    update_square: float = 0.0
    weight_square: float = 0.0


class UpdateSample:
    """Some of the rows of a step as they were before it, `as_of` what they are read as of."""

    def __init__(self, shard: TableShard, local_rows: NDArray[np.int64], as_of: CatchUp | None) -> None:
        self._shard = shard
        self._num_rows = local_rows.size
        self._rows = local_rows[:: max(1, local_rows.size // SAMPLED_ROWS)]
        self._before = shard.finished_masters(self._rows, as_of)

    def after(self) -> LastUpdate:
        """What the step did, once it is done."""
        moved = self._shard.masters(self._rows) - self._before
        return LastUpdate(
            rows=self._num_rows,
            update_square=float(np.square(moved, dtype=np.float64).sum()),
            weight_square=float(np.square(self._before, dtype=np.float64).sum()),
        )


class RowOptimizer(Protocol):
    """Moves the rows of one shard. Its state lies in the shard, but for what `learning_rates` brings back."""

    shard: TableShard
    last_update: LastUpdate

    @property
    def rule(self) -> str:
        """`tables.update`, by which a checkpoint says how its rows were trained."""

    @property
    def read_as_of(self) -> CatchUp | None:
        """What rows are read as of (`TableShard.read`); None: as they stand. This rank's readers share it."""

    @property
    def learning_rates(self) -> NDArray[np.float64]:
        """Of all steps so far."""

    @property
    def step_count(self) -> int:
        """Steps so far."""

    def restore(self, learning_rates: NDArray[np.float64]) -> None:
        """Forget all steps, and count those that had these learning rates."""

    def step(self, row_gradients: RowGradients, lr: float, gradient_scale: float = 1.0) -> None:
        """Move the shard by one step with the gradients times `gradient_scale` (clipping, 1 / tokens).

        Rows that are not in `row_gradients` have a zero gradient. A step to be skipped is one not to call. Collective
        over all ranks.
        """
