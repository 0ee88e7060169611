"""DeepSeek-V4.1's optimizer for tables on one shard: momentum whose rows and columns are balanced over a whole table.

The table of one Engram layer is one matrix. `engram_kernels.row_sinkhorn` says what a step does to rows; what columns
need of all rows is summed over all ranks, in their order, so that a step is collective.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from engram_kernels.row_sinkhorn import MomentumStep
from engram_megatron.config_optimizer import OptimizerConfig
from engram_megatron.optimizer.row_optimizer import LastUpdate, UpdateSample
from engram_megatron.tables.row_gradients import RowGradients
from engram_megatron.tables.row_store import RowPart
from engram_megatron.tables.table_shard import TableShard

Float64 = NDArray[np.float64]


class RowSinkhorn:
    """The optimizer of `shard`, in host memory and with one moment.

    `first_rows` [L + 1]: where the table of each Engram layer begins in the joined row space, and the end of the last.
    `sum_over_ranks` sums an array over all ranks and gives the same result on each.
    """

    rule = "sinkhorn"
    read_as_of = None  # every row moves in every step: none is behind

    def __init__(
        self,
        shard: TableShard,
        first_rows: Sequence[int],
        optimizer: OptimizerConfig,
        sum_over_ranks: Callable[[Float64], Float64],
    ) -> None:
        self.shard = shard
        self.optimizer = optimizer
        self.sum_over_ranks = sum_over_ranks
        self.last_update = LastUpdate()
        self._table_rows = np.diff(np.asarray(first_rows))
        self._borders = shard.layout.local_starts(shard.shard, first_rows)
        self._learning_rates: list[float] = []

    @property
    def learning_rates(self) -> Float64:
        return np.array(self._learning_rates)

    @property
    def step_count(self) -> int:
        return len(self._learning_rates)

    def restore(self, learning_rates: Float64) -> None:
        self._learning_rates = learning_rates.tolist()

    def step(self, row_gradients: RowGradients, lr: float, gradient_scale: float = 1.0) -> None:
        """As of `RowOptimizer`."""
        optimizer, row_dim = self.optimizer, self.shard.row_dim
        sample = UpdateSample(self.shard, row_gradients.local_rows, None)
        self.shard.touch(row_gradients.local_rows)
        (part,) = self.shard.sweeping(row_gradients.local_rows)
        layers = [self._of_layer(part, layer, row_gradients, gradient_scale) for layer in range(self._table_rows.size)]
        for layer in layers:
            layer.blend()
        means = self.sum_over_ranks(np.array([layer.norm_sum() for layer in layers])) / self._table_rows
        thresholds = optimizer.sinkhorn_row_threshold * means
        columns = self._balance_columns(layers, thresholds)
        for layer, of_layer, threshold in zip(layers, columns, thresholds, strict=True):
            layer.move(of_layer, threshold, lr * optimizer.sinkhorn_update_rms * math.sqrt(row_dim))
        self._learning_rates.append(lr)
        self.last_update = sample.after()

    def _balance_columns(self, layers: Sequence[MomentumStep], thresholds: Float64) -> Float64:
        """What the columns of each layer's table are multiplied by, [L, D]."""
        columns = np.ones((len(layers), self.shard.row_dim))
        for _ in range(self.optimizer.sinkhorn_steps // 2):
            squares = [layer.column_squares(*of) for layer, *of in zip(layers, columns, thresholds, strict=True)]
            norms = np.sqrt(self.sum_over_ranks(np.stack(squares)))
            columns = np.divide(columns, norms, out=np.zeros_like(columns), where=norms > 0)
        return columns

    def _of_layer(self, part: RowPart, layer: int, gradients: RowGradients, scale: float) -> MomentumStep:
        start, stop = self._borders[layer : layer + 2]
        mine = slice(*np.searchsorted(gradients.local_rows, (start, stop)).tolist())
        return MomentumStep(
            part.table,
            start,
            stop,
            gradients.local_rows[mine],
            gradients.gradients[mine],
            scale,
            self.step_count + 1,
            self.optimizer.sinkhorn_momentum,
        )
