"""Adam on one shard of the tables, equal to `torch.optim.Adam` on the whole table as one dense weight.

Dense Adam moves a row with live moments in every step, whether the step used it or not; a row that never had a
gradient has zero moments and stays. So a step is one sweep over the shard that passes over the untouched rows, and
moments, update and gradient scale are fused in it. Kingma & Ba, arXiv 1412.6980, in torch's form:

    m <- m + (1 - beta1) (g - m)        v <- beta2 v + (1 - beta2) g^2
    w <- w - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit, prange

from engram_megatron.tables.row_gradients import RowGradients
from engram_megatron.tables.table_shard import TableShard

_ROWS_PER_TASK = 1024


class RowAdam:
    """The optimizer of `shard`; its state (moments, touched rows, step count) lives in the shard."""

    def __init__(self, shard: TableShard, *, beta1: float, beta2: float, eps: float) -> None:
        self.shard = shard
        self.beta1 = beta1
        self.beta2 = beta2
        self.eps = eps

    @property
    def step_count(self) -> int:
        """Steps that the rows have seen."""
        return self.shard.step_count

    def step(self, row_gradients: RowGradients, lr: float, gradient_scale: float = 1.0) -> None:
        """Move the shard by one step of Adam with the gradients times `gradient_scale` (clipping, 1 / tokens).

        Rows that are not in `row_gradients` have a zero gradient. A step to be skipped is one not to call.
        """
        shard = self.shard
        shard.step_count += 1
        bias_correction1 = 1.0 - self.beta1**shard.step_count
        bias_correction2_sqrt = math.sqrt(1.0 - self.beta2**shard.step_count)
        # In the table's own precision, so that the kernel computes in it.
        scalars = (
            shard.dtype.type(value)
            for value in (
                gradient_scale,
                1.0 - self.beta1,
                self.beta2,
                1.0 - self.beta2,
                lr / bias_correction1,
                bias_correction2_sqrt,
                self.eps,
                np.finfo(shard.dtype).tiny,
            )
        )
        _sweep(
            shard.weight,
            shard.exp_avg,
            shard.exp_avg_sq,
            shard.touched,
            row_gradients.local_rows,
            row_gradients.gradients,
            *scalars,
        )

    def gradient_norm_squared(self, row_gradients: RowGradients) -> float:
        """Sum of squares of the unscaled gradients of this shard, in float64 and in a fixed order."""
        per_row = np.empty(row_gradients.local_rows.size, np.float64)
        _squared_norms(row_gradients.gradients, per_row)
        return float(per_row.sum())


@njit(cache=True, parallel=True, error_model="numpy")
def _sweep(
    weight: Any,
    exp_avg: Any,
    exp_avg_sq: Any,
    touched: Any,
    gradient_rows: Any,
    gradients: Any,
    gradient_scale: Any,
    one_minus_beta1: Any,
    beta2: Any,
    one_minus_beta2: Any,
    step_size: Any,
    bias_correction2_sqrt: Any,
    eps: Any,
    tiny: Any,
) -> None:
    num_rows, row_dim = weight.shape
    zero = gradient_scale * 0
    for task in prange((num_rows + _ROWS_PER_TASK - 1) // _ROWS_PER_TASK):
        start = task * _ROWS_PER_TASK
        next_gradient = np.searchsorted(gradient_rows, start)
        for row in range(start, min(start + _ROWS_PER_TASK, num_rows)):
            has_gradient = next_gradient < gradient_rows.size and gradient_rows[next_gradient] == row
            if not (has_gradient or touched[row]):
                continue
            for column in range(row_dim):
                g = gradients[next_gradient, column] * gradient_scale if has_gradient else zero
                m = exp_avg[row, column]
                m += one_minus_beta1 * (g - m)
                v = beta2 * exp_avg_sq[row, column] + one_minus_beta2 * (g * g)
                # Moments of rows left alone decay through the subnormal numbers, where a second moment stays for 300
                # steps and its square root made the sweep 4 times slower. A first moment below 1.2e-38 (float32) moves
                # no weight, and without it neither does v.
                m = m if abs(m) >= tiny else zero
                v = v if v >= tiny or m != zero else zero
                weight[row, column] -= step_size * m / (math.sqrt(v) / bias_correction2_sqrt + eps)
                exp_avg[row, column] = m
                exp_avg_sq[row, column] = v
            if has_gradient:
                touched[row] = True
                next_gradient += 1


@njit(cache=True, parallel=True)
def _squared_norms(gradients: Any, per_row: Any) -> None:
    for row in prange(per_row.size):
        total = 0.0
        for column in range(gradients.shape[1]):
            value = np.float64(gradients[row, column])
            total += value * value
        per_row[row] = total
