"""Which module stands where in a decoder layer, as megatron-core's ModuleSpecs."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec_for_backend
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.multi_latent_attention import MLASelfAttentionSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from engram_megatron import platform
from engram_megatron.config import RunConfig
from engram_megatron.model.core_attention import CausalCoreAttention
from engram_megatron.model.counts import has_mtp_experts
from engram_megatron.model.latent_attention import LatentSelfAttention
from engram_megatron.model.multi_token_prediction import PredictionSubmodules
from engram_megatron.model.pipeline_layout import chunk_memory_layers
from engram_megatron.model.rms_norm import RMSNorm
from engram_megatron.model.router import SigmoidRouter
from engram_megatron.model.transformer_layer import EngramSubmodules, EngramTransformerLayer


def block_submodules(config: RunConfig, layers: range) -> TransformerBlockSubmodules:
    """The decoder layers `layers`, counted from 0, of one chunk of the model."""
    moe = config.model.moe
    num_dense = config.model.num_layers if moe is None else moe.num_leading_dense_layers
    memory_layers = chunk_memory_layers(config, layers)
    specs = [_layer(config, memory_layers, is_dense=layer < num_dense) for layer in layers]
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=_norm())


def prediction_submodules(config: RunConfig) -> PredictionSubmodules:
    """The multi-token prediction layer: its decoder layer is of the kind of the model's last one, without memory."""
    return PredictionSubmodules(
        norm=_norm(),
        column_parallel_linear=_backend().column_parallel_linear(),
        transformer_layer=_layer(config, (), is_dense=not has_mtp_experts(config.model)),
    )


def _backend() -> Any:
    """Transformer Engine's linear layers on a GPU machine that has it, megatron-core's elsewhere."""
    if platform.has_transformer_engine():
        from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

        return TESpecProvider()
    return LocalSpecProvider()


def _norm() -> Any:
    return _backend().layer_norm(rms_norm=True) if platform.has_transformer_engine() else RMSNorm


def _layer(config: RunConfig, memory_layers: tuple[int, ...], *, is_dense: bool) -> ModuleSpec:
    backend, norm = _backend(), _norm()
    column, row = backend.column_parallel_linear(), backend.row_parallel_linear()
    attention = ModuleSpec(
        module=LatentSelfAttention,
        params={"attn_mask_type": AttnMaskType.causal, "attention": config.model.attention},
        submodules=MLASelfAttentionSubmodules(
            linear_q_proj=column,
            linear_q_down_proj=column,
            linear_q_up_proj=column,
            linear_kv_down_proj=column,
            linear_kv_up_proj=column,
            core_attention=CausalCoreAttention,
            linear_proj=row,
            q_layernorm=norm,  # built only when queries are compressed
            kv_layernorm=norm,
        ),
    )
    if is_dense:
        feed_forward = partial(MLP.as_mlp_submodule, submodules=MLPSubmodules(linear_fc1=column, linear_fc2=row))
    else:
        assert config.model.moe is not None
        experts = get_moe_module_spec_for_backend(backend, num_experts=config.model.moe.num_experts)
        parts = replace(experts.keywords["submodules"], router=SigmoidRouter)
        feed_forward = partial(experts.func, submodules=parts)
    return ModuleSpec(
        module=EngramTransformerLayer,
        submodules=EngramSubmodules(
            input_layernorm=norm,
            self_attention=attention,
            pre_mlp_layernorm=norm,
            mlp=feed_forward,
            mhc=config.model.mhc,
            engram=config.engram,
            memory_layers=memory_layers,
            recompute=config.training.recomputed_modules,
        ),
    )
