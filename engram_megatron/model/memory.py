"""Bytes that one rank of a layout needs, by kind, from the config alone.

Weights, gradients, optimizer state and tables are exact for the layout that `placement` states (allocator padding
aside). Activations are an estimate: tensors that autograd must keep for the backward pass, each once, and what
recomputation brings back of one layer at a time, with balanced routing, divided by the tensor size (sequence
parallelism), attention without a score matrix. Left out: workspace, the allocator's fragmentation, transport buffers,
and float32 copies that unfused norms and gates keep beside bfloat16 tensors (with them a small model in eager PyTorch
kept 1.3 times the estimate, 1.1 times in float32).

Shape letters in the formulas: C hidden size, n residual streams, S streams of Engram, E memory width, F feed-forward
size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from engram_megatron.config import RunConfig
from engram_megatron.model.counts import TensorSpec, engram_streams, has_mtp_experts
from engram_megatron.model.placement import (
    DTYPE_BYTES,
    gradient_bytes,
    rank_elements,
    rank_table_rows,
    stage_engram_layers,
    stage_layers,
    stage_moe_layers,
    stage_mtp_layers,
    stage_specs,
)

MASTER_BYTES = 4  # float32
TABLE_VALUES = 3  # a weight and Adam's two moments per table element


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """Bytes of one rank of one pipeline stage."""

    weights: int
    gradients: int
    master_weights: int  # float32 copies, for bfloat16 weights only
    optimizer_state: int
    activations: int  # estimate, all microbatches in flight
    microbatches_in_flight: int  # a number, not bytes
    host_tables: int  # rows, first and second moments, in host memory

    @property
    def device(self) -> int:
        """All but the tables."""
        return self.weights + self.gradients + self.master_weights + self.optimizer_state + self.activations


def rank_memory(
    config: RunConfig, world_size: int, stage: int, state_values: Callable[[TensorSpec], int]
) -> RankMemory:
    """Memory of a rank of pipeline stage `stage`.

    `state_values` says how many values the optimizer keeps per element of a tensor (Muon 1, Adam 2). Raises
    `UsageError` where the layout does not divide over `world_size` ranks.
    """
    weights = masters = elements = states = 0
    for spec in stage_specs(config, stage):
        held = rank_elements(spec, config.parallel)
        element_bytes = weight_bytes(spec, config)
        weights += held * element_bytes
        masters += 0 if element_bytes >= MASTER_BYTES else held * MASTER_BYTES
        elements += held
        states += held * state_values(spec)
    microbatches = config.training.num_microbatches(config.parallel.data(world_size))
    # 1F1B: a stage runs ahead of the last one by the number of stages behind it.
    in_flight = min(config.parallel.pipeline - stage, microbatches)
    return RankMemory(
        weights=weights,
        gradients=elements * gradient_bytes(config),
        master_weights=masters,
        optimizer_state=states * gradient_bytes(config),
        activations=in_flight * microbatch_activation_bytes(config, stage),
        microbatches_in_flight=in_flight,
        host_tables=rank_table_rows(config, world_size) * _table_row_bytes(config),
    )


def weight_bytes(spec: TensorSpec, config: RunConfig) -> int:
    """Bytes per element as the model stores it: hyper-connections keep their own, wider dtype."""
    is_mapping = spec.placed_as == "hyper-connections"
    return DTYPE_BYTES[config.model.mhc.mapping_dtype if is_mapping else config.training.dtype]


def job_table_bytes(config: RunConfig, world_size: int) -> int:
    """Host memory of the tables and their moments over all ranks, padding of the last blocks included."""
    return world_size * rank_table_rows(config, world_size) * _table_row_bytes(config)


def microbatch_activation_bytes(config: RunConfig, stage: int) -> int:
    """Estimate of what one microbatch leaves on a rank of pipeline stage `stage` until its backward pass."""
    model, parallel = config.model, config.parallel
    mtp = stage_mtp_layers(config, stage)
    layers = _Layers(
        all=len(stage_layers(config, stage)) + mtp,
        moe=stage_moe_layers(config, stage) + mtp * has_mtp_experts(model),
        engram=stage_engram_layers(config, stage),
    )
    token_bytes = _layers_bytes(config, layers)
    # multi-token prediction: input and output of two norms, the two outputs side by side
    token_bytes += mtp * 6 * model.hidden_size * DTYPE_BYTES[config.training.dtype]
    if stage == parallel.pipeline - 1:
        # final norm's input and output, logits, and their float32 softmax
        head_values = 2 * model.hidden_size + model.vocab_size
        head_bytes = head_values * DTYPE_BYTES[config.training.dtype] + model.vocab_size * gradient_bytes(config)
        token_bytes += (1 + mtp) * head_bytes
    tokens = config.training.micro_batch_size * config.data.sequence_length // parallel.context
    return tokens * token_bytes // parallel.tensor


@dataclass(frozen=True)
class _Layers:
    """Numbers of layers, and how many of them have experts and memory."""

    all: int
    moe: int
    engram: int


def _layers_bytes(config: RunConfig, layers: _Layers) -> int:
    """Bytes per token of all `layers`: what they keep, and what one of them computes again."""
    kept, one = _kept_bytes(config, layers), _Layers(*(min(1, n) for n in (layers.all, layers.moe, layers.engram)))
    return kept + _kept_by_parts(config, one, frozenset()) - _kept_bytes(config, one)


def _kept_bytes(config: RunConfig, layers: _Layers) -> int:
    if config.training.recompute == "full":  # the streams at each layer's beginning
        values = layers.all * config.model.mhc.num_streams * config.model.hidden_size
        return values * DTYPE_BYTES[config.training.dtype]
    return _kept_by_parts(config, layers, config.training.recomputed_modules)


def _kept_by_parts(config: RunConfig, layers: _Layers, again: frozenset[str]) -> int:
    """Bytes per token that `layers` keep of all but the parts `again`. Attention has no score matrix to leave out."""
    streams, width = config.model.mhc.num_streams, config.model.hidden_size
    values = layers.all * _attention_values(config)
    if "mhc" in again and streams > 1:
        values += layers.all * (streams + 2) * width  # streams at the layer's beginning, outputs of both sub-layers
        mapping_bytes = 0
    else:
        values += layers.all * 2 * _residual_values(config)
        mapping_bytes = layers.all * 2 * _mapping_bytes(config)
    if "feed_forward" not in again:
        values += (layers.all - layers.moe) * 3 * config.model.dense_ffn_size  # gate, up and their product
        values += layers.moe * _moe_values(config)
    if "engram" not in again:
        values += layers.engram * _engram_values(config)
    return values * DTYPE_BYTES[config.training.dtype] + mapping_bytes


def _residual_values(config: RunConfig) -> int:
    """One sub-layer: norm's input and output 2C; with n > 1 also the streams nC and the sub-layer's output C."""
    streams, width = config.model.mhc.num_streams, config.model.hidden_size
    return 2 * width + ((streams + 1) * width if streams > 1 else 0)


def _mapping_bytes(config: RunConfig) -> int:
    """mHC of one sub-layer, in the mapping dtype: a copy of the streams nC, and per Sinkhorn iteration 2 (n*n + n)."""
    streams, mapping_dtype = config.model.mhc.num_streams, config.model.mhc.mapping_dtype
    if streams == 1:
        return 0
    copy = streams * config.model.hidden_size if mapping_dtype != config.training.dtype else 0
    sinkhorn = config.model.mhc.sinkhorn_iterations * 2 * (streams * streams + streams)
    return (copy + sinkhorn) * DTYPE_BYTES[mapping_dtype]


def _attention_values(config: RunConfig) -> int:
    """MLA: compressed queries, compressed keys and values before and after their norm, q, k, kv and the output."""
    a = config.model.attention
    compressed = 2 * (a.query_lora_rank or 0) + 2 * a.kv_lora_rank + a.rope_head_dim
    per_head = 2 * (a.nope_head_dim + a.rope_head_dim) + (a.nope_head_dim + a.value_head_dim) + a.value_head_dim
    return compressed + a.num_heads * per_head


def _moe_values(config: RunConfig) -> int:
    """Router scores; per routed copy its input C, gate, up, product 3F and output C; shared experts 3F."""
    moe = config.model.moe
    if moe is None:
        return 0
    routed = moe.top_k * (2 * config.model.hidden_size + 3 * moe.expert_ffn_size)
    return moe.num_experts + routed + 3 * moe.num_shared_experts * moe.expert_ffn_size


def _engram_values(config: RunConfig) -> int:
    """Memory E, keys SC, value C, streams SC, gated value SC, and for the convolution its norm and output 2SC."""
    engram, width = config.engram, config.model.hidden_size
    if engram is None:
        return 0
    streams = engram_streams(config)
    keys = streams * width if engram.gate else 0
    conv = 2 * streams * width if engram.conv else 0
    return engram.memory_dim + keys + width + 2 * streams * width + conv


def _table_row_bytes(config: RunConfig) -> int:
    """Bytes of one table row with its moments."""
    if config.engram is None:
        return 0
    return config.engram.row_dim * TABLE_VALUES * DTYPE_BYTES[config.engram.table_dtype]
