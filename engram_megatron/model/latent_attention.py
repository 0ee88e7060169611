"""Multi-head Latent Attention over tensor and context ranks, with exactly the norms that its spec names.

Under context parallelism a rank has the queries of its own positions and the keys and values of all: it gathers what
they are made of, the latents behind their norm and the rope keys (kv_lora_rank + rope_head_dim numbers per position,
the same for all heads), and projects them up for the whole sequence. Gathered keys and values would be 14 times as many
numbers in the Engram paper's models.

Shape legend: T positions of the sequence, Q those of this context rank (T / context), S those of this rank's hidden
states (Q / tensor), B sequences, C hidden width, N heads of this rank, D query/key width, V value width, R latent
width, P rope width.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.multi_latent_attention import MLASelfAttention, MLASelfAttentionSubmodules
from torch import Tensor

from engram_megatron.config import AttentionConfig
from engram_megatron.model.rotary_embedding import RotaryEmbedding
from engram_megatron.model.sequence_partition import SequencePartition


class LatentSelfAttention(MLASelfAttention):
    """megatron-core's MLA, without its choice of norms, without its error under tensor parallelism, and with context
    parallelism.

    megatron-core 0.19.2 lets a spec have a norm on the latent keys and values only if queries get one too (fused into
    their projection by Transformer Engine, when queries are not compressed). DeepSeek's MLA has none there.
    """

    def __init__(
        self, config: Any, submodules: MLASelfAttentionSubmodules, *args: Any, attention: AttentionConfig, **kwargs: Any
    ) -> None:
        super().__init__(config, submodules, *args, **kwargs)
        del self.rotary_pos_emb  # megatron-core's
        self.rotary = RotaryEmbedding(attention, config.params_dtype)
        self.partition = SequencePartition(
            context=config.context_parallel_size, tensor=config.tensor_model_parallel_size
        )

    def _resolve_qk_norm_config(self, submodules: MLASelfAttentionSubmodules) -> dict[str, Any]:
        return {
            "linear_q_proj": submodules.linear_q_proj,
            "linear_q_up_proj": submodules.linear_q_up_proj,
            "linear_kv_up_proj": submodules.linear_kv_up_proj,
            "q_layernorm": submodules.q_layernorm,
            "kv_layernorm": submodules.kv_layernorm,
        }

    def get_query_key_value_tensors(
        self, hidden_states: Tensor, *_unused: Any, **_also_unused: Any
    ) -> tuple[Tensor, Tensor, Tensor, None, None]:
        """query [Q, B, N, D] at this context rank's positions, key [T, B, N, D] and value [T, B, N, V] at all.

        hidden_states [S, B, C]. Called by megatron-core's `forward`, whose further arguments (inference, packed
        sequences by cumulated lengths) are not used here; the two None are latents that it hands to sparse attention.
        """
        query_latent, key_value_latent = self._qkv_down_projection(hidden_states)
        length = hidden_states.shape[0] * self.partition.num_ranks
        query = self._query(query_latent, self.partition.chunks(length, self.pg_collection.cp.rank()))
        key, value = self._key_and_value(key_value_latent, length)
        return query, key, value, None, None

    def _qkv_down_projection(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """(hidden states, or the latent of queries, and latent keys and values with the rope key), each [S, B, ...].

        megatron-core 0.19.2 loses gradient of the rope key when `linear_kv_down_proj` is divided over tensor ranks: it
        gathers the key, every rank uses it whole for its own heads, and the gather's backward keeps one rank's slice of
        one rank's gradient instead of the sum over ranks. Handed over whole in width and divided along the sequence,
        the key can be gathered by a function whose backward sums.
        """
        query, key_value = super()._qkv_down_projection(hidden_states)
        if self.config.tensor_model_parallel_size > 1:
            key_value = scatter_to_sequence_parallel_region(gather_from_tensor_model_parallel_region(key_value))
        return query, key_value

    def _query(self, latent_SBC: Tensor, runs: list[range]) -> Tensor:
        if self.config.q_lora_rank is None:
            query, _ = self.linear_q_proj(latent_SBC)
        else:
            query, _ = self.linear_q_up_proj(self.q_layernorm(latent_SBC))
        query_QBND = query.unflatten(-1, (self.num_attention_heads_per_partition, self.q_head_dim))
        nope, rope = query_QBND.split([self.config.qk_head_dim, self.config.qk_pos_emb_head_dim], dim=-1)
        return torch.cat([nope, self._rotate(rope, runs)], dim=-1)

    def _key_and_value(self, latent_SBRP: Tensor, length: int) -> tuple[Tensor, Tensor]:
        latent, rope = latent_SBRP.split([self.config.kv_lora_rank, self.config.qk_pos_emb_head_dim], dim=-1)
        latent = self.kv_layernorm(latent)
        if self.partition.context > 1:
            both = gather_from_sequence_parallel_region(torch.cat([latent, rope], dim=-1), group=self.pg_collection.cp)
            latent, rope = both.split([self.config.kv_lora_rank, self.config.qk_pos_emb_head_dim], dim=-1)
        key_value, _ = self.linear_kv_up_proj(latent)  # gathers over the tensor ranks
        if self.partition.tensor > 1:
            rope = gather_from_sequence_parallel_region(rope, group=self.tp_group)
        key_value, rope_TBP = self._in_order(key_value), self._in_order(rope)
        heads, nope_dim = self.num_attention_heads_per_partition, self.config.qk_head_dim
        key_value_TBN = key_value.unflatten(-1, (heads, nope_dim + self.config.v_head_dim))
        nope_TBN, value_TBNV = key_value_TBN.split([nope_dim, self.config.v_head_dim], dim=-1)
        rope_TB1P = self._rotate(rope_TBP.unsqueeze(-2), [range(length)])
        key_TBND = torch.cat([nope_TBN, rope_TB1P.expand(-1, -1, heads, -1)], dim=-1)
        return key_TBND, value_TBNV

    def _in_order(self, gathered_T: Tensor) -> Tensor:
        """Positions in the order of the sequence: gathered over context ranks first, then over tensor ranks."""
        context, tensor = self.partition.context, self.partition.tensor
        if context == 1:
            return gathered_T
        blocks = [b for t in range(tensor) for c in range(context) for b in self.partition.blocks(c * tensor + t)]
        parts = gathered_T.unflatten(0, (len(blocks), -1)).unbind(0)
        return torch.cat([parts[place] for place in sorted(range(len(blocks)), key=blocks.__getitem__)])

    def _rotate(self, rope: Tensor, runs: list[range]) -> Tensor:
        """Turn [positions, B, heads, P] by the angles of the positions of `runs`."""
        rotated: Tensor = apply_rotary_pos_emb(
            rope,
            self.rotary.angles(runs, rope.device),
            config=self.config,
            mscale=self.rotary.concentration,
            cp_group=self.pg_collection.cp,
            mla_rotary_interleaved=True,
        )
        return rotated
