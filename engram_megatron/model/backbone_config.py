"""From our config to megatron-core's: every number of the backbone in its own words."""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import MLATransformerConfig

from engram_megatron.config import RunConfig, TrainingConfig
from engram_megatron.model.pipeline_layout import pipeline_layout
from engram_megatron.platform import has_grad_accumulation_fusion

TORCH_DTYPE = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


def backbone_config(config: RunConfig) -> MLATransformerConfig:
    """megatron-core's config of the backbone.

    Rotary angles are `rotary_embedding`'s; of YaRN megatron-core hears what its softmax scale reads, which are 1 and 0
    for plain RoPE (its defaults would scale). Weights are initialised by `initialization`, not by
    megatron-core, so that they do not depend on the layout.
    """
    model, attention, parallel = config.model, config.model.attention, config.parallel
    dtype = TORCH_DTYPE[config.training.dtype]
    yarn = attention.rope == "yarn"
    return MLATransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=attention.num_heads,
        ffn_hidden_size=model.dense_ffn_size,
        q_lora_rank=attention.query_lora_rank,
        kv_lora_rank=attention.kv_lora_rank,
        qk_head_dim=attention.nope_head_dim,
        qk_pos_emb_head_dim=attention.rope_head_dim,
        v_head_dim=attention.value_head_dim,
        qk_layernorm=True,
        rope_type="rope",
        rotary_scaling_factor=attention.yarn_scale if yarn else 1.0,
        mscale_all_dim=attention.yarn_mscale_all_dim if yarn else 0.0,
        tensor_model_parallel_size=parallel.tensor,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=1,
        sequence_parallel=parallel.tensor > 1,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        perform_initialization=False,
        init_method_std=model.init_std,
        layernorm_epsilon=model.norm_eps,
        normalization="RMSNorm",
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=has_grad_accumulation_fusion(),
        hidden_dropout=0.0,
        attention_dropout=0.0,
        calculate_per_token_loss=True,
        **_pipeline(config),
        **_moe(config),
        **_recompute(config.training),
    )


def _recompute(training: TrainingConfig) -> dict[str, object]:
    """Whole layers and core attention are megatron-core's to recompute, the rest is `transformer_layer`'s."""
    if training.recompute == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    modules = training.recomputed_modules
    if "core_attention" in modules and "attention" not in modules:  # the whole of attention is the layer's part
        return {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    return {}


def _pipeline(config: RunConfig) -> dict[str, object]:
    parallel = config.parallel
    if parallel.pipeline == 1:
        return {"pipeline_model_parallel_size": 1}
    layout = pipeline_layout(config)
    interleaved = layout.chunks_per_rank > 1
    return {
        "pipeline_model_parallel_size": parallel.pipeline,
        "virtual_pipeline_model_parallel_size": layout.chunks_per_rank if interleaved else None,
        "pipeline_model_parallel_layout": layout.as_lists(),
        # The interleaved schedule of megatron-core 0.19.2 trains silently wrong with batched sends and receives.
        "overlap_p2p_comm": interleaved,
        "batch_p2p_comm": not interleaved,
    }


def _moe(config: RunConfig) -> dict[str, object]:
    moe = config.model.moe
    if moe is None:
        return {}
    dense = moe.num_leading_dense_layers
    shared = moe.num_shared_experts * moe.expert_ffn_size
    return {
        "num_moe_experts": moe.num_experts,
        "moe_router_topk": moe.top_k,
        "moe_ffn_hidden_size": moe.expert_ffn_size,
        "moe_shared_expert_intermediate_size": shared or None,
        "moe_layer_freq": [0] * dense + [1] * (config.model.num_layers - dense),
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_bias_update_rate": moe.bias_update_rate,
        "moe_router_topk_scaling_factor": moe.routed_scaling_factor,
        "moe_router_pre_softmax": True,
        "moe_router_dtype": {"float32": "fp32", "float64": "fp64"}[moe.router_dtype],
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": False,
    }
