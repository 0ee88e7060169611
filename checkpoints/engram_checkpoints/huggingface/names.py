"""Tensors by two names: those of a checkpoint's backbone, and those of a Hugging Face folder.

DeepSeek-V3's names for the backbone, DeepSeek-V4.1's for Engram and hyper-connections, all behind `model.`;
docs/huggingface.md has the table.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from engram_megatron.config import RunConfig
from engram_megatron.hashing.ngram_hasher import NgramHasher
from engram_megatron.model.counts import TensorSpec, buffer_specs, parameter_specs

TOKEN_MAP = "model.engram_token_map"  # int64 [V]: token id -> compressed id

_TOP = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "output_layer.weight": "lm_head.weight",
}
_IN_LAYER = {
    "input_layernorm.weight": "input_layernorm.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "self_attention.linear_q_proj.weight": "self_attn.q_proj.weight",
    "self_attention.linear_q_down_proj.weight": "self_attn.q_a_proj.weight",
    "self_attention.q_layernorm.weight": "self_attn.q_a_layernorm.weight",
    "self_attention.linear_q_up_proj.weight": "self_attn.q_b_proj.weight",
    "self_attention.linear_kv_down_proj.weight": "self_attn.kv_a_proj_with_mqa.weight",
    "self_attention.kv_layernorm.weight": "self_attn.kv_a_layernorm.weight",
    "self_attention.linear_kv_up_proj.weight": "self_attn.kv_b_proj.weight",
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "mlp.router.weight": "mlp.gate.weight",
    "mlp.router.expert_bias": "mlp.gate.e_score_correction_bias",
    "mhc_attention.mapping.weight": "hc_attn_fn",
    "mhc_attention.bias": "hc_attn_base",
    "mhc_attention.alpha": "hc_attn_scale",
    "mhc_mlp.mapping.weight": "hc_ffn_fn",
    "mhc_mlp.bias": "hc_ffn_base",
    "mhc_mlp.alpha": "hc_ffn_scale",
    "engram.key_value.weight": "engram.wkv.weight",
    "engram.key_value.bias": "engram.wkv.bias",
    "engram.norm_query.weight": "engram.q_weight",
    "engram.norm_key.weight": "engram.k_weight",
    "engram.norm_conv.weight": "engram.conv_norm.weight",
    "engram.short_conv.weight": "engram.conv.weight",
    # Of a multi-token prediction layer
    "hidden_layernorm.weight": "hnorm.weight",
    "embedding_layernorm.weight": "enorm.weight",
    "projection.weight": "eh_proj.weight",
    "final_layernorm.weight": "shared_head.norm.weight",
}
_PROJECTIONS = {"linear_fc1.weight_w": "gate_proj", "linear_fc1.weight_v": "up_proj", "linear_fc2.weight": "down_proj"}
_FEED_FORWARD = re.compile(r"(mlp\.(?:experts\.(?=experts)|shared_experts\.|))(?:experts\.(\d+)\.)?(linear_fc\S+)")
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_MTP_LAYER = re.compile(r"mtp\.layers\.0\.(?:mtp_model_layer\.)?(.+)")


@dataclass(frozen=True)
class NamedTensor:
    """One tensor: its name in a checkpoint, its name in a folder, and its shape.

    `roll`: (dimension, places) by which it is turned on the way out; None: as it is. `wide`: float32 in any model.
    """

    ours: str
    theirs: str
    shape: tuple[int, ...]
    roll: tuple[int, int] | None = None
    wide: bool = False

    def to_theirs(self, tensor: Tensor) -> Tensor:
        return tensor if self.roll is None else tensor.roll(self.roll[1], self.roll[0])

    def to_ours(self, tensor: Tensor) -> Tensor:
        return tensor if self.roll is None else tensor.roll(-self.roll[1], self.roll[0])


@dataclass(frozen=True)
class TableSlice:
    """The rows of the joined table that are one Engram layer's."""

    theirs: str
    first_row: int
    shape: tuple[int, int]


def backbone_tensors(config: RunConfig) -> Iterator[NamedTensor]:
    """Every tensor of the backbone of `config`, router biases included, tables not."""
    for spec in (*parameter_specs(config), *buffer_specs(config)):
        for ours, shape in _stored(spec):
            theirs = _theirs(ours, config.model.num_layers)
            yield NamedTensor(ours, theirs, shape, _roll(ours, config.model.hidden_size), _is_wide(ours))


def table_slices(config: RunConfig, hasher: NgramHasher) -> list[TableSlice]:
    """Layer by layer, as they lie behind each other in the joined table. Heads are in the same order in both."""
    assert config.engram is not None
    borders = [*hasher.layer_offsets.tolist(), hasher.total_rows]
    return [
        TableSlice(f"model.layers.{number - 1}.engram.embed.weight", first, (stop - first, config.engram.row_dim))
        for number, first, stop in zip(config.engram.layer_numbers, borders[:-1], borders[1:], strict=True)
    ]


def _stored(spec: TensorSpec) -> Iterator[tuple[str, tuple[int, ...]]]:
    """What a model's tensor is called in a checkpoint (see `engram_checkpoints.backbone`)."""
    name = spec.name.replace(".local_experts.", ".experts.")
    if not name.endswith("linear_fc1.weight"):
        yield name, spec.shape
        return
    half = (spec.shape[0] // 2, *spec.shape[1:])
    yield f"{name}_w", half
    yield f"{name}_v", half


def _theirs(ours: str, num_layers: int) -> str:
    if ours in _TOP:
        return _TOP[ours]
    in_layer, in_mtp = _LAYER.fullmatch(ours), _MTP_LAYER.fullmatch(ours)
    if in_layer:
        layer, name = int(in_layer[1]), in_layer[2]
    else:
        assert in_mtp, ours
        layer, name = num_layers, in_mtp[1]
    feed_forward = _FEED_FORWARD.fullmatch(name)
    if feed_forward:
        expert = "" if feed_forward[2] is None else f"{feed_forward[2]}."
        name = f"{feed_forward[1]}{expert}{_PROJECTIONS[feed_forward[3]]}.weight"
    else:
        name = _IN_LAYER[name]
    return f"model.layers.{layer}.{name}"


def _roll(ours: str, width: int) -> tuple[int, int] | None:
    if ".engram.key_value." in ours:
        return 0, -width  # rows: value and keys here, keys and value there
    if ours == "mtp.layers.0.projection.weight":
        return 1, width  # columns: hidden state and embedding here, embedding and hidden state there
    return None


def _is_wide(ours: str) -> bool:
    return ".mhc_" in ours or ours.endswith("router.expert_bias")


def dtype_of(tensor: NamedTensor, model: torch.dtype) -> torch.dtype:
    """Of a tensor of a model whose weights are of dtype `model`."""
    return torch.float32 if tensor.wide else model
