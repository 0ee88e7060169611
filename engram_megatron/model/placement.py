"""Which tensors, elements and tokens one rank of a layout holds: arithmetic on a `RunConfig`, no process groups.

Layout as trained today: plain data parallelism (every replica holds whole gradients and optimizer state), equal numbers
of layers per pipeline stage, sequence parallelism wherever tensor > 1, routed experts divided by the expert size only
(expert ranks are taken from data * tensor * context). The tensor size divides both vocabulary matrices, all projections
of attention, and dense and shared feed-forwards; norms, routers, mHC and Engram are held whole by every tensor rank.
"""

from __future__ import annotations

from math import ceil

from engram_megatron.config import ParallelConfig, RunConfig
from engram_megatron.model.counts import Part, TensorSpec, parameter_specs, table_rows

DTYPE_BYTES = {"bfloat16": 2, "float32": 4, "float64": 8}

ROUTED: Part = "routed experts"
_TENSOR_PARALLEL_PARTS: tuple[Part, ...] = (
    "token embedding",
    "output head",
    "attention",
    "dense feed-forward",
    "shared experts",
    "multi-token prediction",  # its projection; all else in it is placed as elsewhere
)
_LATENT_NORMS = ("q_layernorm.weight", "kv_layernorm.weight")


def stage_layers(config: RunConfig, stage: int) -> range:
    """Layers, from 0, of pipeline stage `stage`."""
    per_stage = config.model.num_layers // config.parallel.pipeline
    return range(stage * per_stage, (stage + 1) * per_stage)


def stage_specs(config: RunConfig, stage: int) -> list[TensorSpec]:
    """The torch parameters of pipeline stage `stage`, with their whole shapes."""
    layers, last = stage_layers(config, stage), config.parallel.pipeline - 1

    def stands_here(spec: TensorSpec) -> bool:
        if spec.layer is not None:
            return spec.layer in layers
        if spec.part == "token embedding":  # multi-token prediction has a copy of it on the last stage
            return stage == 0 or (stage == last and config.model.mtp.num_layers > 0)
        return stage == last

    return [spec for spec in parameter_specs(config) if stands_here(spec)]


def stage_mtp_layers(config: RunConfig, stage: int) -> int:
    """Number of multi-token prediction layers of pipeline stage `stage`."""
    return config.model.mtp.num_layers if stage == config.parallel.pipeline - 1 else 0


def stage_engram_layers(config: RunConfig, stage: int) -> int:
    """Number of Engram layers of pipeline stage `stage`."""
    if config.engram is None:
        return 0
    return sum(number - 1 in stage_layers(config, stage) for number in config.engram.layer_numbers)


def stage_moe_layers(config: RunConfig, stage: int) -> int:
    """Number of mixture-of-experts layers of pipeline stage `stage`."""
    moe = config.model.moe
    return 0 if moe is None else sum(layer >= moe.num_leading_dense_layers for layer in stage_layers(config, stage))


def rank_elements(spec: TensorSpec, parallel: ParallelConfig) -> int:
    """Elements of `spec` that one rank of its pipeline stage holds."""
    if spec.placed_as == ROUTED:
        return spec.count // parallel.expert
    divided = spec.placed_as in _TENSOR_PARALLEL_PARTS and not spec.name.endswith(_LATENT_NORMS)
    return ceil(spec.count / parallel.tensor) if divided else spec.count


def gradient_ranks(spec: TensorSpec, parallel: ParallelConfig, world_size: int) -> int:
    """Ranks that hold the same elements of `spec` and sum their gradients."""
    replicas = parallel.data(world_size) * parallel.context
    return replicas * parallel.tensor // parallel.expert if spec.placed_as == ROUTED else replicas


def rank_step_tokens(config: RunConfig, world_size: int) -> int:
    """Tokens per step whose activations pass through one (data, context) coordinate."""
    tokens = config.training.global_batch_size * config.data.sequence_length
    return tokens // (config.parallel.data(world_size) * config.parallel.context)


def rank_table_rows(config: RunConfig, world_size: int) -> int:
    """Largest number of table rows that one rank owns: blocks of `engram.block_rows` rows dealt over all ranks."""
    if config.engram is None:
        return 0
    rows = table_rows(config.engram)
    blocks = ceil(rows / config.engram.block_rows)
    return min(rows, ceil(blocks / world_size) * config.engram.block_rows)


def gradient_bytes(config: RunConfig) -> int:
    """Bytes per element of a gradient buffer: float32 for bfloat16 weights, else the weights' dtype."""
    return max(4, DTYPE_BYTES[config.training.dtype])
