"""Bytes that one rank exchanges in one step, by kind, from the config alone.

Gradients are exact for ring all-reduces in the gradients' dtype over the layout that `placement` states; everything
else is an estimate: tokens routed evenly over experts, table rows sent in the tables' dtype. Counted is what a rank
sends (as much arrives); for the tables what a rank of a stage with Engram layers asks for, the owners' side being the
same volume spread over all ranks. Row ids, loss and norm reductions, and checkpoints are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from math import log2

from engram_megatron.config import RunConfig
from engram_megatron.model.counts import has_mtp_experts
from engram_megatron.model.placement import (
    DTYPE_BYTES,
    ROUTED,
    gradient_bytes,
    gradient_ranks,
    rank_elements,
    rank_step_tokens,
    stage_engram_layers,
    stage_layers,
    stage_moe_layers,
    stage_mtp_layers,
    stage_specs,
)

# Sequence-parallel collectives of a column- and row-parallel pair: all-gather and reduce-scatter forward, the two
# backward, and one more all-gather of the input for the weights' gradient (arXiv 2205.05198).
_COLLECTIVES_PER_PAIR = 5

# Unique rows per lookup against tokens per exchange, measured with the 27B tables on 129M tokens of technical
# documentation and source code: more repetitive than web text.
_MEASURED_UNIQUE = ((4_000, 0.49), (64_000, 0.47), (262_000, 0.42), (1_300_000, 0.33), (5_200_000, 0.21))


@dataclass(frozen=True, kw_only=True)
class RankTraffic:
    """Bytes per step of one rank of one pipeline stage."""

    dense_gradients: int  # ring all-reduce over data * context ranks
    expert_gradients: int  # ring all-reduce over data * tensor * context / expert ranks
    expert_all_to_all: int  # estimate; dispatch and combine, forward and backward
    table_rows: int  # forward; upper bound, no duplicate left out
    table_gradients: int  # backward; upper bound, no duplicate left out
    tensor_parallel: int  # estimate
    pipeline: int
    context: int  # estimate; keys and values around the ring

    @property
    def total(self) -> int:
        """All kinds."""
        return sum(getattr(self, name) for name in self.__dataclass_fields__)


def rank_traffic(config: RunConfig, world_size: int, stage: int) -> RankTraffic:
    """Traffic of a rank of pipeline stage `stage`; raises `UsageError` where the layout does not divide."""
    dense, expert = _gradients(config, world_size, stage)
    rows = _table_rows(config, world_size, stage)
    return RankTraffic(
        dense_gradients=dense,
        expert_gradients=expert,
        expert_all_to_all=_expert_all_to_all(config, world_size, stage),
        table_rows=rows,
        table_gradients=rows,
        tensor_parallel=_tensor_parallel(config, world_size, stage),
        pipeline=_pipeline(config, world_size, stage),
        context=_context(config, world_size, stage),
    )


def expected_unique_ratio(exchange_tokens: int) -> float:
    """Expected unique rows per lookup when `exchange_tokens` tokens ask together: interpolated measurements.

    Linear in the logarithm of the tokens, constant outside the measured range. An expectation for the text and the
    tables that were measured, not a bound.
    """
    points = _MEASURED_UNIQUE
    tokens = min(max(exchange_tokens, points[0][0]), points[-1][0])
    for (low, low_ratio), (high, high_ratio) in pairwise(points):
        if tokens <= high:
            weight = log2(tokens / low) / log2(high / low)
            return low_ratio + weight * (high_ratio - low_ratio)
    raise AssertionError("tokens were clamped to the measured range")


def _gradients(config: RunConfig, world_size: int, stage: int) -> tuple[int, int]:
    """(dense, routed experts) bytes; a ring of n ranks sends 2 (n - 1) / n of the buffer."""
    dense = expert = 0
    for spec in stage_specs(config, stage):
        ranks = gradient_ranks(spec, config.parallel, world_size)
        sent = 2 * (ranks - 1) * rank_elements(spec, config.parallel) * gradient_bytes(config) // ranks
        if spec.placed_as == ROUTED:
            expert += sent
        else:
            dense += sent
    return dense, expert


def _hidden_bytes(config: RunConfig, world_size: int) -> int:
    """Bytes of one hidden state of every token of a step, as one tensor rank holds it (sequence parallel)."""
    tokens = rank_step_tokens(config, world_size) // config.parallel.tensor
    return tokens * config.model.hidden_size * DTYPE_BYTES[config.training.dtype]


def _expert_all_to_all(config: RunConfig, world_size: int, stage: int) -> int:
    """Each token's `top_k` copies go out and come back, forward and backward; 1 / expert of them stay."""
    if config.model.moe is None:
        return 0
    layers = stage_moe_layers(config, stage) + stage_mtp_layers(config, stage) * has_mtp_experts(config.model)
    copies = layers * config.model.moe.top_k
    away = config.parallel.expert - 1
    return 4 * copies * _hidden_bytes(config, world_size) * away // config.parallel.expert


def _table_rows(config: RunConfig, world_size: int, stage: int) -> int:
    """Rows of every token and Engram layer; a tensor group asks once; 1 / world of the rows is at home."""
    engram = config.engram
    if engram is None:
        return 0
    tokens = rank_step_tokens(config, world_size) // config.parallel.tensor
    row_bytes = engram.memory_dim * DTYPE_BYTES[engram.table_dtype]
    return tokens * stage_engram_layers(config, stage) * row_bytes * (world_size - 1) // world_size


def _tensor_parallel(config: RunConfig, world_size: int, stage: int) -> int:
    """Sequence-parallel collectives: attention of every layer, dense or shared feed-forward, embedding, head."""
    parallel, moe = config.parallel, config.model.moe
    mtp = stage_mtp_layers(config, stage)
    layers, moe_layers = len(stage_layers(config, stage)) + mtp, stage_moe_layers(config, stage)
    moe_layers += mtp * has_mtp_experts(config.model)
    unpaired = moe_layers if moe is not None and moe.num_shared_experts == 0 else 0
    collectives = _COLLECTIVES_PER_PAIR * (2 * layers - unpaired)
    # multi-token prediction: embedding 2, head 3, projection 3 of twice the width, and 2 of its output
    collectives += mtp * (2 + 3 + 6 + 2)
    collectives += 2 if stage == 0 else 0  # embedding: reduce-scatter, and all-gather backward
    collectives += 3 if stage == parallel.pipeline - 1 else 0  # head: all-gather, and two backward
    # A collective over t ranks moves (t - 1) of the t shards through every rank.
    return collectives * (parallel.tensor - 1) * _hidden_bytes(config, world_size)


def _pipeline(config: RunConfig, world_size: int, stage: int) -> int:
    """All residual streams to the next stage, their gradients to the previous one; with multi-token prediction the
    embedding's gradient between the first and the last stage, whose all-reduce over two ranks sends it once."""
    last = config.parallel.pipeline - 1
    neighbours = (stage < last) + (stage > 0)
    sent = neighbours * config.model.mhc.num_streams * _hidden_bytes(config, world_size)
    if config.model.mtp.num_layers > 0 and last > 0 and stage in (0, last):
        embedding = next(spec for spec in stage_specs(config, stage) if spec.part == "token embedding")
        sent += rank_elements(embedding, config.parallel) * gradient_bytes(config)
    return sent


def _context(config: RunConfig, world_size: int, stage: int) -> int:
    """Keys and values pass every other rank of the ring forward, and again backward with their gradients."""
    a, parallel = config.model.attention, config.parallel
    channels = a.num_heads * (a.nope_head_dim + a.rope_head_dim + a.value_head_dim) // parallel.tensor
    layers = len(stage_layers(config, stage)) + stage_mtp_layers(config, stage)
    token_bytes = channels * DTYPE_BYTES[config.training.dtype] * layers
    return 3 * (parallel.context - 1) * rank_step_tokens(config, world_size) * token_bytes
