"""What a rank is asked to run, and what it hands over: numpy arrays under global names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
# Global name of a router to the experts [S, T, K] of a step: S sequences, T positions, K chosen
StepChoices = dict[str, NDArray[np.int64]]


@dataclass(frozen=True, eq=False)
class Shard:
    """A rank's part of a tensor, one of `parts` along dimension `dim`; `dim` None: the whole tensor."""

    values: Array
    dim: int | None
    part: int


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of the table: global row ids [N] and values [N, D]."""

    ids: Array
    values: Array


@dataclass(frozen=True, eq=False)
class State:
    """What training has made of the model: backbone, table and the router's balancing biases."""

    parameters: dict[str, Shard]
    table: Rows
    expert_bias: dict[str, Array]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run does and keeps: gradients and states of the first `recorded_steps` steps, the numbers of all.

    `choices`: experts to replay, by step. `record_choices`: note the experts (one rank, one sequence per microbatch).
    `jitter` > 0: start from weights that differ in their last bit, another draw for every number.
    """

    num_steps: int
    recorded_steps: int = 0
    choices: Sequence[StepChoices] | None = None
    record_choices: bool = False
    jitter: int = 0


@dataclass(frozen=True, eq=False)
class StepRecord:
    """One step of one rank. Gradients are those of the mean loss per token, clipped."""

    loss: float
    gradient_norm: float
    num_tokens: int
    tokens_per_expert: dict[int, Array]  # layer number to the tokens that this rank sent to each expert
    gradients: dict[str, Shard]
    table_gradients: Rows
    after: State


@dataclass(frozen=True, eq=False)
class RankRecord:
    """A run of one rank. Steps hold gradients and states, and `choices` experts, only where `Plan` asked for it."""

    start: State
    steps: list[StepRecord]
    end: State
    choices: list[StepChoices]


@dataclass(frozen=True, eq=False)
class RankCell:
    """What one rank saw of a cell. `packed_loss`: of `documents.packed_batch`, where documents are kept apart."""

    float64: RankRecord
    float32: RankRecord
    bfloat16: RankRecord
    packed_loss: float | None


@dataclass(frozen=True, eq=False)
class Reference:
    """What one rank alone saw: five steps in float64, in float32 with the same experts and with other last bits of the
    weights too, in bfloat16; and documents one by one."""

    float64: RankRecord
    float32: list[RankRecord]
    bfloat16: RankRecord
    loss_alone: float | None
