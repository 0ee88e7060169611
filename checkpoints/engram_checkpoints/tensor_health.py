"""Signs that a tensor, or an expert, has gone wrong, from its numbers alone."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import numpy as np
import torch

from engram_checkpoints.checkpoint_source import TableSource, row_bytes
from engram_checkpoints.table_format import LAST_STEP
from engram_checkpoints.tensor_source import TensorSource, row_pieces
from engram_checkpoints.tensor_tables import row_tensors, tensor_name
from engram_megatron.config import RunConfig

PIECE_BYTES = 32 * 1024**2  # of a tensor in memory at a time
_STUCK = 0.9  # of the steps so far in which a bias has risen
_ENOUGH_STEPS = 100  # before that, biases say little


@dataclass
class Health:
    """Of the elements that `add` was given. `norm`: root of the sum of squares of the finite ones."""

    num_nan: int = 0
    num_inf: int = 0
    largest: float = 0.0
    _square: float = 0.0

    def add(self, values: torch.Tensor) -> None:
        wide = values.double()
        finite = wide.isfinite()
        self.num_nan += int(wide.isnan().sum())
        self.num_inf += int(wide.isinf().sum())
        wide = torch.where(finite, wide, 0.0)
        self._square += float(wide.square().sum())
        if wide.numel():
            self.largest = max(self.largest, float(wide.abs().max()))

    @property
    def norm(self) -> float:
        return sqrt(self._square)

    def problem(self) -> str | None:
        if self.num_nan or self.num_inf:
            return f"{self.num_nan:,} NaN and {self.num_inf:,} infinite elements"
        return None


def tensor_health(source: TensorSource, name: str) -> Health:
    """Of one tensor, piece by piece."""
    health = Health()
    for rows in row_pieces(source.tensors[name], PIECE_BYTES):
        health.add(source.read(name, rows))
    return health


def table_health(tables: TableSource) -> tuple[dict[str, Health], int]:
    """Of each array of the tables, rows as they stand; and the number of rows that never had a gradient."""
    description, never_touched = tables.description, 0
    health = {name: Health() for name in row_tensors(description, tables.rows(0, 0))}
    step = max(1, PIECE_BYTES // row_bytes(description))
    for start in range(0, description.total_rows, step):
        rows = tables.rows(start, min(start + step, description.total_rows))
        never_touched += int(np.count_nonzero(rows.last_step == 0))
        for name, values in row_tensors(description, rows).items():
            health[name].add(values)
    del health[tensor_name(LAST_STEP)]
    return health, never_touched


def starved_experts(source: TensorSource, config: RunConfig, step: int) -> dict[str, list[int]]:
    """Per router the experts that got less than their share of tokens in nearly every step: loss-free balancing has
    raised their bias by its rate each time, and it has not helped."""
    if config.model.moe is None or not config.model.moe.bias_update_rate or step < _ENOUGH_STEPS:
        return {}
    limit = _STUCK * config.model.moe.bias_update_rate * step
    found = {}
    for name in source.tensors:
        if name.endswith("router.expert_bias"):
            experts = torch.nonzero(source.read(name) >= limit).flatten().tolist()
            if experts:
                found[name] = experts
    return found


def untrained(source: TensorSource, health: dict[str, Health]) -> list[str]:
    """Parameters whose first moment is zero throughout: no gradient has ever reached them."""
    moments = ("optimizer.exp_avg.", "optimizer.momentum_buffer.")
    return [
        name.split(".", 2)[2]
        for name in source.tensors
        if name.startswith(moments) and name in health and health[name].largest == 0 and not health[name].problem()
    ]
