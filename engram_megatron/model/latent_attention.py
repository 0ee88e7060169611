"""Multi-head Latent Attention with exactly the norms that its spec names."""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.multi_latent_attention import MLASelfAttention, MLASelfAttentionSubmodules


class LatentSelfAttention(MLASelfAttention):
    """megatron-core's MLA, without its choice of norms.

    megatron-core 0.19.2 lets a spec have a norm on the latent keys and values only if queries get one too (fused into
    their projection by Transformer Engine, when queries are not compressed). DeepSeek's MLA has none there.
    """

    def _resolve_qk_norm_config(self, submodules: MLASelfAttentionSubmodules) -> dict[str, Any]:
        return {
            "linear_q_proj": submodules.linear_q_proj,
            "linear_q_up_proj": submodules.linear_q_up_proj,
            "linear_kv_up_proj": submodules.linear_kv_up_proj,
            "q_layernorm": submodules.q_layernorm,
            "kv_layernorm": submodules.kv_layernorm,
        }
