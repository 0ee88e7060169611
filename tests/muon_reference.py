"""Muon as Moonlight's report states it (arXiv 2502.16982, section 2 and its toy script), in float64, one matrix at a
time and with no code of the project: what the optimizer is compared with."""

from __future__ import annotations

import math

import torch
from torch import Tensor

A, B, C = 3.4445, -4.7750, 2.0315


def orthogonalized(update: Tensor) -> Tensor:
    """Five Newton-Schulz steps on one matrix."""
    x = update / (update.square().sum().sqrt() + 1e-7)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    for _ in range(5):
        gram = x @ x.T
        x = A * x + B * (gram @ x) + C * (gram @ (gram @ x))
    return x.T if tall else x


class ReferenceMuon:
    """Momentum 0.95 with Nesterov, update RMS 0.2, decoupled weight decay; `rows` are the parts' row numbers."""

    def __init__(self, weight: Tensor, rows: list[list[int]] | None = None):
        self.weight = weight.double().clone()
        self.buffer = torch.zeros_like(self.weight)
        self.rows = rows or [list(range(len(weight)))]

    def step(self, gradient: Tensor, lr: float, weight_decay: float = 0.1) -> None:
        gradient = gradient.double()
        self.buffer = 0.95 * self.buffer + gradient
        looked_ahead = gradient + 0.95 * self.buffer
        self.weight = self.weight * (1 - lr * weight_decay)
        for rows in self.rows:
            part = looked_ahead[rows]
            scale = 0.2 * math.sqrt(max(part.shape))
            self.weight[rows] -= lr * scale * orthogonalized(part)


def part_rows(name: str, num_rows: int, *, heads: int, nope: int, value: int, kv_rank: int) -> list[list[int]] | None:
    """Row numbers of the parts of a fused weight of the backbone; None where it is one matrix."""
    if name.endswith("linear_fc1.weight"):
        return [list(range(num_rows // 2)), list(range(num_rows // 2, num_rows))]
    if name.endswith("linear_kv_down_proj.weight"):
        return [list(range(kv_rank)), list(range(kv_rank, num_rows))]
    if name.endswith("linear_kv_up_proj.weight"):
        head = nope + value
        keys = [h * head + i for h in range(heads) for i in range(nope)]
        return [keys, [r for r in range(num_rows) if r not in set(keys)]]
    return None
