"""A folder's config.json from a run's config, and back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from engram_megatron.config import (
    AttentionConfig,
    EngramConfig,
    ModelConfig,
    MoEConfig,
    MTPConfig,
    RunConfig,
)
from engram_megatron.errors import UsageError
from engram_megatron.hashing.ngram_hasher import NgramHasher

MODEL_TYPE = "engram"
AUTO_MAP = {
    "AutoConfig": "configuration_engram.EngramConfig",
    "AutoModelForCausalLM": "modeling_engram.EngramForCausalLM",
}


def to_folder_config(
    config: RunConfig, hasher: NgramHasher | None, dtype: str, document_end_token_id: int
) -> dict[str, Any]:
    """config.json of an export. `hasher` None: a model without Engram."""
    model = config.model
    return {
        "architectures": ["EngramForCausalLM"],
        "auto_map": AUTO_MAP,
        "model_type": MODEL_TYPE,
        "dtype": dtype,
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "intermediate_size": model.dense_ffn_size,
        "rms_norm_eps": model.norm_eps,
        "initializer_range": model.init_std,
        "max_position_embeddings": config.data.sequence_length,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": document_end_token_id,
        "pad_token_id": document_end_token_id,
        **_attention_fields(model.attention),
        **_moe_fields(model.moe),
        "num_nextn_predict_layers": model.mtp.num_layers,
        "hc_mult": model.mhc.num_streams,
        "hc_sinkhorn_iters": model.mhc.sinkhorn_iterations,
        **({} if config.engram is None or hasher is None else _engram_fields(config.engram, hasher)),
        "document_end_token_id": document_end_token_id,
        "separate_documents": config.data.separate_documents,
    }


def from_folder_config(values: dict[str, Any], base: RunConfig) -> RunConfig:
    """`base` with the model that config.json describes; what it does not say (initialisation, updates) stays `base`'s.

    Raises `UsageError` for a model that this project does not have.
    """
    kind = values.get("model_type")
    if kind not in (MODEL_TYPE, "deepseek_v3"):
        raise UsageError(f"config.json has model_type {kind!r}; what can be imported is {MODEL_TYPE} and deepseek_v3")
    _check_supported(values)
    try:
        model, engram = _model(values, base.model), _engram(values, base.engram)
        dtype, length = str(values.get("dtype") or values["torch_dtype"]), int(values["max_position_embeddings"])
    except KeyError as error:
        raise UsageError(f"config.json has no field {error}, which a {kind} model has; complete it") from error
    if dtype not in ("bfloat16", "float32"):
        raise UsageError(f"config.json has dtype {dtype!r}; convert the weights to bfloat16 or float32 first")
    training = replace(base.training, dtype="bfloat16" if dtype == "bfloat16" else "float32")
    length = length if kind == MODEL_TYPE else min(length, base.data.sequence_length)
    separate = values.get("separate_documents", base.data.separate_documents)
    data = replace(base.data, sequence_length=length, separate_documents=separate)
    return replace(base, model=model, engram=engram, training=training, data=data)


def _check_supported(values: dict[str, Any]) -> None:
    """Raise `UsageError` for what our layers do not do."""
    required = {
        "quantization_config": None,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        "moe_layer_freq": 1,
        "rope_interleave": True,
    }
    for name, wanted in required.items():
        if values.get(name, wanted) != wanted:
            found = values[name].get("quant_method") if name == "quantization_config" else values[name]
            hint = (
                "dequantize it to bfloat16 first" if name == "quantization_config" else f"only {wanted} can be imported"
            )
            raise UsageError(f"config.json has {name} = {found}; {hint}")
    groups, chosen = values.get("n_group") or 1, values.get("topk_group") or 1
    if groups != chosen:
        raise UsageError(
            f"config.json has n_group = {groups}, topk_group = {chosen}: experts are chosen within groups, which our "
            "router does not do; only models with n_group = topk_group can be imported"
        )


def _attention_fields(attention: AttentionConfig) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": attention.rope_theta}
    if attention.rope == "yarn":
        rope |= {
            "rope_type": "yarn",
            "factor": attention.yarn_scale,
            "original_max_position_embeddings": attention.yarn_original_length,
            "beta_fast": attention.yarn_beta_fast,
            "beta_slow": attention.yarn_beta_slow,
            "mscale": attention.yarn_mscale,
            "mscale_all_dim": attention.yarn_mscale_all_dim,
        }
    return {
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_heads,
        "q_lora_rank": attention.query_lora_rank,
        "kv_lora_rank": attention.kv_lora_rank,
        "qk_nope_head_dim": attention.nope_head_dim,
        "qk_rope_head_dim": attention.rope_head_dim,
        "v_head_dim": attention.value_head_dim,
        "rope_parameters": rope,
        "rope_interleave": True,
        "attention_bias": False,
    }


def _moe_fields(moe: MoEConfig | None) -> dict[str, Any]:
    if moe is None:
        return {"n_routed_experts": 0}
    return {
        "n_routed_experts": moe.num_experts,
        "n_shared_experts": moe.num_shared_experts,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": moe.expert_ffn_size,
        "first_k_dense_replace": moe.num_leading_dense_layers,
        "routed_scaling_factor": moe.routed_scaling_factor,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        "n_group": 1,
        "topk_group": 1,
    }


def _engram_fields(engram: EngramConfig, hasher: NgramHasher) -> dict[str, Any]:
    rows = hasher.primes_LOJ.sum(axis=(1, 2)).tolist()
    return {
        "engram_layer_ids": [number - 1 for number in engram.layer_numbers],
        "engram_hash_seed_ids": list(engram.hash_seed_ids),
        "engram_hash_seed": engram.hash_seed,
        "engram_num_embeddings": rows,
        "engram_max_ngram_size": engram.max_ngram_order,
        "engram_vocab_size": engram.rows_per_head,
        "engram_n_heads": engram.num_heads_per_order,
        "engram_head_dim": engram.row_dim,
        "engram_pad_token_id": engram.pad_token_id,
        "engram_compressed_vocab_size": hasher.projection.compressed_size,
        "engram_primes": hasher.primes_LOJ.tolist(),
        "engram_hash_identity": hasher.identity(),
        "engram_gate": engram.gate,
        "engram_conv": engram.conv,
        "engram_conv_kernel_size": engram.conv_kernel_size,
        "engram_conv_norm_eps": engram.conv_norm_eps,
        "engram_norm_eps": engram.norm_eps,
        "engram_bias": engram.bias,
        "engram_multi_branch": engram.multi_branch,
        "engram_compression": engram.compression,
        "engram_cut_at_documents": engram.cut_at_documents,
    }


def _model(values: dict[str, Any], base: ModelConfig) -> ModelConfig:
    experts = values.get("n_routed_experts")
    moe = base.moe or MoEConfig()
    if experts:
        moe = replace(
            moe,
            num_experts=experts,
            num_shared_experts=values.get("n_shared_experts") or 0,
            top_k=values["num_experts_per_tok"],
            expert_ffn_size=values["moe_intermediate_size"],
            num_leading_dense_layers=values["first_k_dense_replace"],
            routed_scaling_factor=values["routed_scaling_factor"],
        )
    # DeepSeek's own MTP layer copies embedding and head and is fed by another hidden state: left out of an import.
    mtp = values.get("num_nextn_predict_layers", 0) if values["model_type"] == MODEL_TYPE else 0
    streams, iterations = values.get("hc_mult", 1), values.get("hc_sinkhorn_iters", base.mhc.sinkhorn_iterations)
    return replace(
        base,
        num_layers=values["num_hidden_layers"],
        hidden_size=values["hidden_size"],
        vocab_size=values["vocab_size"],
        dense_ffn_size=values["intermediate_size"],
        norm_eps=values["rms_norm_eps"],
        init_std=values.get("initializer_range", base.init_std),
        attention=_attention(values, base.attention),
        moe=moe if experts else None,
        mhc=replace(base.mhc, num_streams=streams, sinkhorn_iterations=iterations),
        mtp=MTPConfig(num_layers=mtp, loss_weight=base.mtp.loss_weight),
    )


def _attention(values: dict[str, Any], base: AttentionConfig) -> AttentionConfig:
    return replace(
        base,
        num_heads=values["num_attention_heads"],
        query_lora_rank=values["q_lora_rank"],
        kv_lora_rank=values["kv_lora_rank"],
        nope_head_dim=values["qk_nope_head_dim"],
        rope_head_dim=values["qk_rope_head_dim"],
        value_head_dim=values["v_head_dim"],
        **_rope(values),
    )


def _rope(values: dict[str, Any]) -> dict[str, Any]:
    """From `rope_parameters`, or `rope_scaling` and `rope_theta` of older files; transformers' defaults."""
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    kind: Literal["default", "yarn"] | str = rope.get("rope_type", rope.get("type", "default"))
    fields: dict[str, Any] = {"rope_theta": float(rope.get("rope_theta", values.get("rope_theta", 10000.0)))}
    if kind == "default":
        return fields | {"rope": "rope"}
    if kind != "yarn":
        raise UsageError(f"config.json has rope_type {kind}; only default and yarn can be imported")
    return fields | {
        "rope": "yarn",
        "yarn_scale": float(rope["factor"]),
        "yarn_original_length": int(rope["original_max_position_embeddings"]),
        "yarn_beta_fast": float(rope.get("beta_fast") or 32),
        "yarn_beta_slow": float(rope.get("beta_slow") or 1),
        "yarn_mscale": float(rope.get("mscale") or 1),
        "yarn_mscale_all_dim": float(rope.get("mscale_all_dim") or 0),
    }


def _engram(values: dict[str, Any], base: EngramConfig | None) -> EngramConfig | None:
    layers = values.get("engram_layer_ids")
    if not layers:
        return None
    heads = (values["engram_max_ngram_size"] - 1) * values["engram_n_heads"]
    return replace(
        base or EngramConfig(),
        layer_numbers=tuple(layer + 1 for layer in layers),
        hash_seed_ids=tuple(values["engram_hash_seed_ids"]),
        hash_seed=values["engram_hash_seed"],
        max_ngram_order=values["engram_max_ngram_size"],
        num_heads_per_order=values["engram_n_heads"],
        rows_per_head=values["engram_vocab_size"],
        memory_dim=heads * values["engram_head_dim"],
        pad_token_id=values["engram_pad_token_id"],
        compression=values["engram_compression"],
        gate=values["engram_gate"],
        conv=values["engram_conv"],
        conv_kernel_size=values["engram_conv_kernel_size"],
        bias=values["engram_bias"],
        multi_branch=values["engram_multi_branch"],
        norm_eps=values["engram_norm_eps"],
        conv_norm_eps=values["engram_conv_norm_eps"],
        cut_at_documents=values["engram_cut_at_documents"],
    )
