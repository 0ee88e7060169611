"""Core attention on torch's scaled_dot_product_attention, with documents kept apart.

Shape legend: T positions, B sequences of a microbatch, N heads of this rank, D query/key width, V value width.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule


class SdpaCoreAttention(MegatronModule):
    """Causal attention for MLA without Transformer Engine: query/key and value heads may differ in width.

    megatron-core's own `DotProductAttention` rejects MLA's `k_channels`. The block's `attention_mask` carries
    document ids here (int32 [B, T], equal numbers = one document) or None for one document per sequence: a mask of
    T x T booleans is made only where it is used, and nothing larger than [B, T] crosses pipeline or recompute borders.
    RoPE needs no restart at document starts: scores depend on the distance of two positions only.
    """

    def __init__(self, config: Any, softmax_scale: float, **_unused: Any) -> None:
        super().__init__(config=config)
        assert config.context_parallel_size == 1, "context parallelism needs its own core attention"
        assert config.attention_dropout == 0.0, "Engram models train without dropout"
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query_TBND: torch.Tensor,
        key_TBND: torch.Tensor,
        value_TBNV: torch.Tensor,
        document_ids_BT: torch.Tensor | None,
        **_unused: Any,
    ) -> torch.Tensor:
        """Return [T, B, N * V], the attended values of all local heads side by side."""
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query_TBND, key_TBND, value_TBNV))
        mask = None if document_ids_BT is None else same_document_causal_mask(document_ids_BT)
        attended_BNTV = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=self.softmax_scale
        )
        return attended_BNTV.permute(2, 0, 1, 3).flatten(2)


def same_document_causal_mask(document_ids_BT: torch.Tensor) -> torch.Tensor:
    """Boolean [B, 1, T, T], True where query position i may see key position j: j <= i, same document."""
    length = document_ids_BT.shape[1]
    same = document_ids_BT[:, :, None] == document_ids_BT[:, None, :]
    causal = torch.ones(length, length, dtype=torch.bool, device=document_ids_BT.device).tril()
    return (same & causal)[:, None]
