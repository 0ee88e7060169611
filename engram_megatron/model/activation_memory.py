"""Estimate of the activations that a rank keeps, from the config alone.

Counted are tensors that autograd must keep for the backward pass, each once, and what recomputation brings back of one
layer at a time, with balanced routing, divided by the tensor size (sequence parallelism), attention without a score
matrix. Recomputation takes away what the recomputed module keeps, but for its input:
    full            of every layer only its input streams and memory stay
    feed_forward    all of it
    mhc             mappings, mixed streams and inputs of sub-layers; a layer's input and the sub-layers' outputs stay
    engram          all of it but the memory
    core_attention  nothing that counts here: its inputs stay, and so does its output, the next projection's input
Left out: workspace, the allocator's fragmentation, transport buffers, and float32 copies that unfused norms and gates
keep beside bfloat16 tensors (with them a small model in eager PyTorch kept 1.3 times the estimate, 1.1 times in
float32).

Shape letters in the formulas: C hidden size, n residual streams, S streams of Engram, E memory width, F feed-forward
size.
"""

from __future__ import annotations

from engram_megatron.config import RunConfig
from engram_megatron.config_fields import DTYPE_BYTES
from engram_megatron.model.counts import engram_streams
from engram_megatron.model.pipeline_layout import pipeline_layout
from engram_megatron.model.pipeline_schedule import peak_kept
from engram_megatron.model.placement import FLOAT32_BYTES


def activation_bytes(config: RunConfig, pipeline_rank: int, microbatches: int) -> int:
    """The most that all microbatches of a step in flight leave on a rank of pipeline rank `pipeline_rank`."""
    layout = pipeline_layout(config)
    chunks = [chunk_activation_bytes(config, pipeline_rank, chunk) for chunk in range(layout.chunks_per_rank)]
    again = max(
        _whole_token_bytes(config, layer) - _kept_token_bytes(config, layer)
        for layer in layout.layers_of_rank(pipeline_rank)
    )
    return peak_kept(pipeline_rank, layout.ranks, microbatches, chunks) + _rank_tokens(config, again)


def passes_in_flight(config: RunConfig, pipeline_rank: int, microbatches: int) -> int:
    """The most passes of a microbatch through a chunk that wait for their backward pass at one time."""
    layout = pipeline_layout(config)
    return peak_kept(pipeline_rank, layout.ranks, microbatches, [1] * layout.chunks_per_rank)


def chunk_activation_bytes(config: RunConfig, pipeline_rank: int, chunk: int) -> int:
    """What one pass of a microbatch through a chunk leaves until its backward pass."""
    layout = pipeline_layout(config)
    token_bytes = sum(_kept_token_bytes(config, layer) for layer in layout.layers(pipeline_rank, chunk))
    if pipeline_rank == layout.ranks - 1 and chunk == layout.chunks_per_rank - 1:
        token_bytes += (1 + config.model.mtp.num_layers) * _head_token_bytes(config)
        token_bytes += config.model.mtp.num_layers * _kept_token_bytes(config, config.model.num_layers - 1)
    return _rank_tokens(config, token_bytes)


def _rank_tokens(config: RunConfig, token_bytes: int) -> int:
    """Bytes of a microbatch on one rank."""
    tokens = config.training.micro_batch_size * config.data.sequence_length // config.parallel.context
    return tokens * token_bytes // config.parallel.tensor


def _head_token_bytes(config: RunConfig) -> int:
    """Final norm's input and output, logits, and their softmax in float32 at least."""
    value_bytes = DTYPE_BYTES[config.training.dtype]
    values = 2 * config.model.hidden_size + config.model.vocab_size
    return values * value_bytes + config.model.vocab_size * max(FLOAT32_BYTES, value_bytes)


def _kept_token_bytes(config: RunConfig, layer: int) -> int:
    if config.training.recompute == "full":
        values = config.model.mhc.num_streams * config.model.hidden_size
        if _has_engram(config, layer):
            assert config.engram is not None
            values += config.engram.memory_dim
        return values * DTYPE_BYTES[config.training.dtype]
    return _by_parts(config, layer, config.training.recomputed_modules)


def _whole_token_bytes(config: RunConfig, layer: int) -> int:
    return _by_parts(config, layer, frozenset())


def _by_parts(config: RunConfig, layer: int, again: frozenset[str]) -> int:
    """What a layer keeps of all but the parts `again`."""
    moe = config.model.moe
    is_dense = moe is None or layer < moe.num_leading_dense_layers
    values = _residual_values(config, again)
    if "attention" not in again:
        values += _attention_values(config)
    if "feed_forward" not in again:
        values += 3 * config.model.dense_ffn_size if is_dense else _moe_values(config)  # dense: gate, up, product
    if _has_engram(config, layer):
        values += _engram_values(config, again)
    mapping = 0 if "mhc" in again else 2 * _mapping_bytes(config)
    return values * DTYPE_BYTES[config.training.dtype] + mapping


def _has_engram(config: RunConfig, layer: int) -> bool:
    return config.engram is not None and layer + 1 in config.engram.layer_numbers


def _residual_values(config: RunConfig, again: frozenset[str]) -> int:
    """Both sub-layers: norm's input and output 2C each; with n > 1 also the streams nC and the sub-layer's output C."""
    streams, width = config.model.mhc.num_streams, config.model.hidden_size
    if streams == 1:
        return 2 * 2 * width
    if "mhc" in again:
        return (streams + 2) * width
    return 2 * (streams + 3) * width


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
    a, context = config.model.attention, config.parallel.context
    compressed = 2 * (a.query_lora_rank or 0) + 2 * a.kv_lora_rank + a.rope_head_dim
    query_and_output = a.nope_head_dim + a.rope_head_dim + a.value_head_dim
    key_and_value = (a.nope_head_dim + a.rope_head_dim) + (a.nope_head_dim + a.value_head_dim)
    # Keys and values of the whole sequence stand on every context rank.
    return compressed + a.num_heads * (query_and_output + key_and_value * context)


def _moe_values(config: RunConfig) -> int:
    """Router scores; per routed copy its input C, gate, up, product 3F and output C; shared experts 3F."""
    moe = config.model.moe
    assert moe is not None
    routed = moe.top_k * (2 * config.model.hidden_size + 3 * moe.expert_ffn_size)
    return moe.num_experts + routed + 3 * moe.num_shared_experts * moe.expert_ffn_size


def _engram_values(config: RunConfig, again: frozenset[str]) -> int:
    """Memory E, keys SC, value C, streams SC, gated value SC, and for the convolution its norm and output 2SC."""
    engram, width = config.engram, config.model.hidden_size
    assert engram is not None
    if "engram" in again:
        return engram.memory_dim
    streams = engram_streams(config)
    keys = streams * width if engram.gate else 0
    conv = 2 * streams * width if engram.conv else 0
    return engram.memory_dim + keys + width + 2 * streams * width + conv
