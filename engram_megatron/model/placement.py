"""Which tensors, elements and tokens one rank of a layout holds: arithmetic on a `RunConfig`, no process groups.

Layers stand on pipeline ranks as `pipeline_layout` says. The tensor size divides both vocabulary matrices, all
projections of attention, and dense and shared feed-forwards, with sequence parallelism wherever tensor > 1; norms,
routers, mHC and Engram are held whole by every tensor rank. Routed experts are divided by the expert size only (expert
ranks are taken from data * tensor * context).
"""

from __future__ import annotations

from math import ceil

from engram_megatron.config import ParallelConfig, RunConfig
from engram_megatron.config_fields import DTYPE_BYTES
from engram_megatron.model.counts import Part, TensorSpec, parameter_specs, table_rows
from engram_megatron.model.pipeline_layout import pipeline_layout

FLOAT32_BYTES = 4

ROUTED: Part = "routed experts"
EMBEDDING: Part = "token embedding"
_TENSOR_PARALLEL_PARTS: tuple[Part, ...] = (
    EMBEDDING,
    "output head",
    "attention",
    "dense feed-forward",
    "shared experts",
    "multi-token prediction",  # its projection; all else in it is placed as its like elsewhere
)
_LATENT_NORMS = ("q_layernorm.weight", "kv_layernorm.weight")


def layers_on(config: RunConfig, pipeline_rank: int) -> list[int]:
    """Decoder layers, from 0, of all chunks of pipeline rank `pipeline_rank`."""
    return pipeline_layout(config).layers_of_rank(pipeline_rank)


def specs_on(config: RunConfig, pipeline_rank: int) -> list[TensorSpec]:
    """The torch parameters of pipeline rank `pipeline_rank`, with their whole shapes.

    Multi-token prediction stands on the last rank and embeds tokens: that rank then has a copy of the embedding.
    """
    layers, last = set(layers_on(config, pipeline_rank)), config.parallel.pipeline - 1
    embedding_ranks = (0, last) if config.model.mtp.num_layers else (0,)

    def stands_here(spec: TensorSpec) -> bool:
        if spec.part == EMBEDDING:
            return pipeline_rank in embedding_ranks
        return pipeline_rank == last if spec.layer is None else spec.layer in layers

    return [spec for spec in parameter_specs(config) if stands_here(spec)]


def engram_layers_on(config: RunConfig, pipeline_rank: int) -> int:
    """Number of Engram layers of pipeline rank `pipeline_rank`."""
    if config.engram is None:
        return 0
    layers = layers_on(config, pipeline_rank)
    return sum(number - 1 in layers for number in config.engram.layer_numbers)


def moe_layers_on(config: RunConfig, pipeline_rank: int) -> int:
    """Number of mixture-of-experts layers of pipeline rank `pipeline_rank`, with that of multi-token prediction, which
    is of the kind of the model's last layer."""
    moe, last = config.model.moe, config.model.num_layers - 1
    if moe is None:
        return 0
    layers = layers_on(config, pipeline_rank) + [last] * mtp_layers_on(config, pipeline_rank)
    return sum(layer >= moe.num_leading_dense_layers for layer in layers)


def mtp_layers_on(config: RunConfig, pipeline_rank: int) -> int:
    """Number of multi-token prediction layers of pipeline rank `pipeline_rank`."""
    return config.model.mtp.num_layers if pipeline_rank == config.parallel.pipeline - 1 else 0


def is_tensor_divided(spec: TensorSpec) -> bool:
    """Whether tensor ranks each hold a part of `spec` (where there are several)."""
    return spec.placed_as in _TENSOR_PARALLEL_PARTS and not spec.name.endswith(_LATENT_NORMS)


def rank_elements(spec: TensorSpec, parallel: ParallelConfig) -> int:
    """Elements of `spec` that one rank of its pipeline stage holds."""
    if spec.placed_as == ROUTED:
        return spec.count // parallel.expert
    return ceil(spec.count / parallel.tensor) if is_tensor_divided(spec) else spec.count


def buffer_elements(spec: TensorSpec, parallel: ParallelConfig) -> int:
    """Elements that `spec` takes of one rank's buffers of gradients, and with the distributed optimizer of weights:
    megatron-core then lets every tensor begin at a multiple of 64. (The end of a buffer is padded by 127 at most.)"""
    if not parallel.distributed_optimizer:
        return rank_elements(spec, parallel)
    if spec.placed_as == ROUTED:
        return _padded(spec.count) // parallel.expert
    return _padded(rank_elements(spec, parallel))


def _padded(elements: int) -> int:
    return ceil(elements / 64) * 64


def gradient_ranks(spec: TensorSpec, parallel: ParallelConfig, world_size: int) -> int:
    """Ranks that hold the same elements of `spec` and sum their gradients."""
    replicas = parallel.data(world_size) * parallel.context
    return replicas * parallel.tensor // parallel.expert if spec.placed_as == ROUTED else replicas


def rank_step_tokens(config: RunConfig, world_size: int) -> int:
    """Tokens per step whose activations pass through one (data, context) coordinate."""
    tokens = config.training.global_batch_size * config.data.sequence_length
    return tokens // (config.parallel.data(world_size) * config.parallel.context)


def rank_table_rows(config: RunConfig, world_size: int) -> int:
    """Largest number of table rows that one rank owns: blocks of `tables.block_rows` rows dealt over all ranks."""
    if config.engram is None:
        return 0
    rows = table_rows(config.engram)
    blocks = ceil(rows / config.tables.block_rows)
    return min(rows, ceil(blocks / world_size) * config.tables.block_rows)


def weight_bytes(spec: TensorSpec, config: RunConfig) -> int:
    """Bytes per element as the model stores it: hyper-connections keep their own, wider dtype."""
    is_mapping = spec.placed_as == "hyper-connections"
    return DTYPE_BYTES[config.model.mhc.mapping_dtype if is_mapping else config.training.dtype]


def gradient_bytes(spec: TensorSpec, config: RunConfig) -> int:
    """Bytes per element of a gradient buffer, a master weight and a value of optimizer state: float32 at least."""
    return max(FLOAT32_BYTES, weight_bytes(spec, config))
