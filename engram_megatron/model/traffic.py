"""Bytes that one rank sends in one step, for each kind of collective, from the config alone.

The convention (`training.collective_bytes` measures by the same): among n ranks
    all-reduce        2 (n - 1) / n of the tensor, a ring
    all-gather          (n - 1) / n of the gathered tensor
    reduce-scatter      (n - 1) / n of the tensor before it is scattered
    all-to-all        what goes to other ranks
    send              all of it
Exact but for two kinds: the experts' all-to-all is that of tokens routed evenly, and the tables' that of rows without
repetition, an upper bound. Checkpoints, logging and validation are left out.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from math import log2

from engram_megatron.config import RunConfig
from engram_megatron.config_fields import DTYPE_BYTES
from engram_megatron.model.activation_traffic import (
    Exchange,
    context_exchange,
    halo_exchange,
    recomputes,
    tensor_exchange,
)
from engram_megatron.model.counts import TensorSpec
from engram_megatron.model.gradient_traffic import embedding_transfers, gradient_transfers, tensor_rank_transfers
from engram_megatron.model.placement import (
    FLOAT32_BYTES,
    engram_layers_on,
    moe_layers_on,
    rank_step_tokens,
)
from engram_megatron.model.transfers import ID_BYTES, Group, Transfer, all_reduced, to_others

# Unique rows per lookup against tokens per exchange, measured with the 27B tables on 129M tokens of technical
# documentation and source code: more repetitive than web text.
_MEASURED_UNIQUE = ((4_000, 0.49), (64_000, 0.47), (262_000, 0.42), (1_300_000, 0.33), (5_200_000, 0.21))


def rank_traffic(
    config: RunConfig, world_size: int, pipeline_rank: int, takes_muon: Callable[[TensorSpec], bool]
) -> list[Transfer]:
    """Everything that a rank of pipeline rank `pipeline_rank` sends in a step; transfers of nothing are left out.

    `takes_muon` says which tensors Muon updates. Raises `UsageError` where the layout does not divide.
    """
    transfers = [
        *gradient_transfers(config, world_size, pipeline_rank),
        *embedding_transfers(config, pipeline_rank),
        *tensor_rank_transfers(config, world_size, pipeline_rank, takes_muon),
        *_activations(config, world_size, pipeline_rank),
        *_loss(config, world_size, pipeline_rank),
        *_experts(config, world_size, pipeline_rank),
        *_streams(config, world_size, pipeline_rank),
        *_tables(config, world_size, pipeline_rank),
        *_control(config, world_size, pipeline_rank),
    ]
    return [transfer for transfer in transfers if transfer.bytes]


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


def _activations(config: RunConfig, world_size: int, pipeline_rank: int) -> list[Transfer]:
    parallel = config.parallel
    tokens, value_bytes = rank_step_tokens(config, world_size), DTYPE_BYTES[config.training.dtype]
    sequences = config.training.global_batch_size // parallel.data(world_size)
    latent_tokens = tokens * parallel.context / parallel.tensor
    both = parallel.tensor * parallel.context
    halo_group: Group = "tensor" if parallel.context == 1 else "tensor x context"
    return [
        *_gather_scatter(
            "activations over tensor ranks",
            "tensor",
            parallel.tensor,
            tensor_exchange(config, pipeline_rank) * (tokens * value_bytes),
        ),
        *_gather_scatter(
            "latent keys and values over context ranks",
            "context",
            parallel.context,
            context_exchange(config, pipeline_rank) * (latent_tokens * value_bytes),
        ),
        *_gather_scatter(
            "convolution halo", halo_group, both, halo_exchange(config, pipeline_rank) * (sequences * value_bytes)
        ),
    ]


def _gather_scatter(purpose: str, group: Group, ranks: int, exchanged: Exchange) -> list[Transfer]:
    """`exchanged`: bytes of whole tensors."""
    return [
        Transfer(purpose, group, "all-gather", to_others(exchanged.gather, ranks)),
        Transfer(purpose, group, "reduce-scatter", to_others(exchanged.scatter, ranks)),
    ]


def _loss(config: RunConfig, world_size: int, pipeline_rank: int) -> list[Transfer]:
    """A vocabulary divided over tensor ranks: the largest logit, the sum and the target's logit of each token."""
    if pipeline_rank != config.parallel.pipeline - 1:
        return []
    losses = 1 + config.model.mtp.num_layers
    value_bytes = max(FLOAT32_BYTES, DTYPE_BYTES[config.training.dtype])
    size = 3 * losses * rank_step_tokens(config, world_size) * value_bytes
    return [Transfer("loss", "tensor", "all-reduce", all_reduced(size, config.parallel.tensor))]


def _experts(config: RunConfig, world_size: int, pipeline_rank: int) -> list[Transfer]:
    """Copies of hidden states with their probabilities go out, results come back; both ways again for gradients."""
    moe, ranks = config.model.moe, config.parallel.expert
    if moe is None:
        return []
    copies = rank_step_tokens(config, world_size) / config.parallel.tensor * moe.top_k
    copies *= moe_layers_on(config, pipeline_rank)
    hidden = config.model.hidden_size * DTYPE_BYTES[config.training.dtype]
    passes = 3 if recomputes(config, "feed_forward") else 2
    size = copies * passes * (2 * hidden + DTYPE_BYTES[moe.router_dtype])
    return [Transfer("expert all-to-all (even routing)", "expert", "all-to-all", to_others(size, ranks))]


def _streams(config: RunConfig, world_size: int, pipeline_rank: int) -> list[Transfer]:
    """All residual streams go to the next chunk, their gradients to the previous one."""
    parallel, streams = config.parallel, config.model.mhc.num_streams
    if parallel.pipeline == 1:
        return []
    first, last = pipeline_rank == 0, pipeline_rank == parallel.pipeline - 1
    sends = 2 * parallel.virtual_pipeline - first - last
    values = rank_step_tokens(config, world_size) // parallel.tensor * streams * config.model.hidden_size
    size = sends * values * DTYPE_BYTES[config.training.dtype]
    return [Transfer("residual streams between pipeline ranks", "pipeline", "send", size)]


def rank_lookups(config: RunConfig, world_size: int, pipeline_rank: int) -> int:
    """Row ids of one rank's positions in one step, repetitions counted."""
    if config.engram is None:
        return 0
    tokens = rank_step_tokens(config, world_size) // config.parallel.tensor
    return tokens * engram_layers_on(config, pipeline_rank) * config.engram.num_heads


def _tables(config: RunConfig, world_size: int, pipeline_rank: int) -> list[Transfer]:
    """As one that asks, a rank sends ids and gradients to other nodes; as an owner, its share of all the rows that they
    ask for. Upper bounds: as if no n-gram came twice."""
    engram, tables = config.engram, config.tables
    if engram is None:
        return []
    nodes = max(1, world_size // max(1, tables.ranks_per_node))  # not known before the start: each rank a node
    row_bytes = engram.row_dim * DTYPE_BYTES[tables.dtype]
    gradient_bytes = engram.row_dim * max(FLOAT32_BYTES, DTYPE_BYTES[tables.dtype])
    asked = rank_lookups(config, world_size, pipeline_rank)
    # With the ids travel their counts per wave, and beside every exchange a checksum to each node.
    ids = (asked + nodes * (3 + 2 * tables.waves)) * ID_BYTES
    tokens = config.training.global_batch_size * config.data.sequence_length
    asked_of_one = tokens * len(engram.layer_numbers) * engram.num_heads / world_size
    return [
        Transfer("table row ids (upper bound)", "tables", "all-to-all", to_others(ids, nodes)),
        Transfer("table rows (upper bound)", "tables", "all-to-all", to_others(asked_of_one * row_bytes, nodes)),
        Transfer("table gradients (upper bound)", "tables", "all-to-all", to_others(asked * gradient_bytes, nodes)),
    ]


def _control(config: RunConfig, world_size: int, pipeline_rank: int) -> list[Transfer]:
    """Loss, token and stop sums, gradient norms, tokens per expert."""
    parallel, moe = config.parallel, config.model.moe
    sent = all_reduced(6 * 8, world_size)  # losses, tokens, stop requests, the tables' norm
    if parallel.distributed_optimizer:
        sent += all_reduced(8, world_size)
    else:
        sent += all_reduced(8, parallel.tensor * parallel.pipeline)
        sent += all_reduced(8, parallel.expert * parallel.pipeline)
    if moe is not None:
        layers, data = moe_layers_on(config, pipeline_rank), parallel.data(world_size)
        biases = layers * moe.num_experts * FLOAT32_BYTES
        sent += all_reduced(biases, parallel.tensor * parallel.context * data)
        passes = config.training.num_microbatches(data) * (2 if recomputes(config, "feed_forward") else 1)
        sent += passes * layers * moe.num_experts * ID_BYTES * (parallel.expert - 1)
    return [Transfer("control", "control", "all-reduce", sent)]
