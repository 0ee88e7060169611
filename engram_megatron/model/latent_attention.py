"""Multi-head Latent Attention with exactly the norms that its spec names, differentiated rightly over tensor ranks."""

from __future__ import annotations

from typing import Any

from megatron.core.tensor_parallel.mappings import (
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.multi_latent_attention import MLASelfAttention, MLASelfAttentionSubmodules
from torch import Tensor


class LatentSelfAttention(MLASelfAttention):
    """megatron-core's MLA, without its choice of norms, and without its error under tensor parallelism.

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

    def _qkv_down_projection(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """(queries or their latent, latent keys and values with the rope key) [T / tensor ranks, B, ...].

        megatron-core 0.19.2 loses gradient of the rope key when `linear_kv_down_proj` is divided over tensor ranks: it
        gathers the key, every rank uses it whole for its own heads, and the gather's backward keeps one rank's slice of
        one rank's gradient instead of the sum over ranks. Handed over whole in width and divided along the sequence,
        the key takes megatron-core's other branch, which gathers the sequence by a function whose backward sums.
        """
        query, key_value = super()._qkv_down_projection(hidden_states)
        if self.config.tensor_model_parallel_size > 1:
            key_value = scatter_to_sequence_parallel_region(gather_from_tensor_model_parallel_region(key_value))
        return query, key_value
