"""The definition of Adam and of balanced momentum on table rows, in plain numpy: every row of the table in every step,
one step after another.

`row_adam` and `row_sinkhorn` are tested against these. Precision is that of the arrays given; float64 for comparisons.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(eq=False)
class DenseRows:
    """A whole table with its moments, all [n, D], and the number of steps taken."""

    weight: NDArray[Any]
    exp_avg: NDArray[Any]
    exp_avg_sq: NDArray[Any]
    step: int = 0

    @classmethod
    def start(cls, weight: NDArray[Any]) -> DenseRows:
        return cls(weight.copy(), np.zeros_like(weight), np.zeros_like(weight))


def dense_adam_step(
    table: DenseRows,
    rows: NDArray[np.int64],
    gradients: NDArray[Any],
    lr: float,
    scale: float,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """One step of `torch.optim.Adam` on the whole table with gradient * scale on `rows` and zero on all others."""
    dense = np.zeros_like(table.weight)
    dense[rows] = gradients * scale
    table.step += 1
    _adam(table, slice(None), dense, lr, betas, eps)


def touched_adam_step(
    table: DenseRows,
    rows: NDArray[np.int64],
    gradients: NDArray[Any],
    lr: float,
    scale: float,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """The same step on `rows` alone: neither weights nor moments of other rows move (`torch.optim.SparseAdam`)."""
    table.step += 1
    _adam(table, rows, gradients * scale, lr, betas, eps)


def _adam(
    table: DenseRows,
    index: slice | NDArray[np.int64],
    gradient: NDArray[Any],
    lr: float,
    betas: tuple[float, float],
    eps: float,
) -> None:
    beta1, beta2 = betas
    m = beta1 * table.exp_avg[index] + (1 - beta1) * gradient
    v = beta2 * table.exp_avg_sq[index] + (1 - beta2) * gradient**2
    table.exp_avg[index], table.exp_avg_sq[index] = m, v
    denominator = np.sqrt(v) / math.sqrt(1 - beta2**table.step) + eps
    denominator[denominator == 0] = 1  # moments of zero without eps
    table.weight[index] -= lr / (1 - beta1**table.step) * m / denominator


@dataclass(eq=False)
class MomentumRows:
    """A whole table with its momentum, both [n, D]."""

    weight: NDArray[Any]
    momentum: NDArray[Any]

    @classmethod
    def start(cls, weight: NDArray[Any]) -> MomentumRows:
        return cls(weight.copy(), np.zeros_like(weight))


def sinkhorn_step(
    table: MomentumRows,
    rows: NDArray[np.int64],
    gradients: NDArray[Any],
    lr: float,
    scale: float,
    *,
    beta: float,
    num_steps: int,
    threshold: float,
    update_rms: float,
) -> None:
    """One step of DeepSeek-V4.1's Algorithm 1 with gradient * scale on `rows` and zero on all others."""
    gradient = np.zeros_like(table.weight)
    gradient[rows] = gradients * scale
    table.momentum = beta * table.momentum + (1 - beta) * gradient
    balanced = beta * table.momentum + (1 - beta) * gradient
    norms = np.linalg.norm(balanced, axis=1)
    balanced[norms <= threshold * norms.mean()] = 0
    for number in range(num_steps):
        norms = np.linalg.norm(balanced, axis=1 - number % 2, keepdims=True)
        balanced = np.divide(balanced, norms, out=np.zeros_like(balanced), where=norms > 0)
    table.weight -= lr * update_rms * math.sqrt(table.weight.shape[1]) * balanced
