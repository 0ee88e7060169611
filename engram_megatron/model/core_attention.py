"""Causal attention of this rank's queries, with documents kept apart.

Shape legend: T positions of the sequence, Q of them with queries on this context rank, B sequences of a microbatch,
N heads of this rank, D query/key width, V value width.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from engram_megatron.model.document_attention import document_attention
from engram_megatron.model.sequence_partition import SequencePartition


class CausalCoreAttention(MegatronModule):
    """Causal attention for MLA without Transformer Engine: query/key and value heads may differ in width.

    megatron-core's own `DotProductAttention` rejects MLA's `k_channels`. The block's `attention_mask` carries
    document ids here (int32 [B, T], equal numbers = one document, rising) or None for one document per sequence: a mask
    is made only where it is used, and nothing larger than [B, T] crosses pipeline or recompute borders.
    RoPE needs no restart at document starts: scores depend on the distance of two positions only.

    Under context parallelism a rank has two chunks of queries, an early and a late one (see `sequence_partition`), and
    all keys and values; each chunk attends to the keys up to its own end, so that all ranks have the same work.
    """

    def __init__(self, config: Any, softmax_scale: float, pg_collection: Any, **_unused: Any) -> None:
        super().__init__(config=config)
        assert config.attention_dropout == 0.0, "Engram models train without dropout"
        self.softmax_scale = softmax_scale
        self.partition = SequencePartition(context=config.context_parallel_size)
        self.context_rank = pg_collection.cp.rank()

    def forward(
        self,
        query_QBND: Tensor,
        key_TBND: Tensor,
        value_TBNV: Tensor,
        document_ids_BT: Tensor | None,
        **_unused: Any,
    ) -> Tensor:
        """Return [Q, B, N * V], the attended values of all local heads side by side."""
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query_QBND, key_TBND, value_TBNV))
        chunks = self.partition.chunks(key.shape[2], self.context_rank)
        attended = [
            causal_attention(part, key, value, document_ids_BT, chunk.start, self.softmax_scale)
            for part, chunk in zip(query.chunk(len(chunks), dim=2), chunks, strict=True)
        ]
        return torch.cat([part_BNQV.permute(2, 0, 1, 3) for part_BNQV in attended]).flatten(2)


def causal_attention(
    query_BNQD: Tensor,
    key_BNTD: Tensor,
    value_BNTV: Tensor,
    document_ids_BT: Tensor | None,
    first: int,
    scale: float,
) -> Tensor:
    """Attended values [B, N, Q, V] of queries at the consecutive positions from `first` on.

    A query sees the keys of its own and earlier positions, with `document_ids_BT` only those of its document: by a
    dense mask on a CPU, without one on a GPU (see `document_attention`).
    """
    seen = first + query_BNQD.shape[2]
    key, value = key_BNTD[:, :, :seen], value_BNTV[:, :, :seen]
    if document_ids_BT is None:
        if first == 0:
            return scaled_dot_product_attention(query_BNQD, key, value, is_causal=True, scale=scale)
        bias = causal_lower_right(query_BNQD.shape[2], seen)
        return scaled_dot_product_attention(query_BNQD, key, value, attn_mask=bias, scale=scale)
    if query_BNQD.is_cuda:
        return document_attention(query_BNQD, key, value, document_ids_BT[:, :seen], scale)
    mask = same_document_causal_mask(document_ids_BT[:, :seen], first)
    return scaled_dot_product_attention(query_BNQD, key, value, attn_mask=mask, scale=scale)


def same_document_causal_mask(document_ids_BT: Tensor, first: int = 0) -> Tensor:
    """Boolean [B, 1, T - first, T], True where the query at position first + i may see the key at position j:
    j <= first + i, same document."""
    length = document_ids_BT.shape[1]
    same = document_ids_BT[:, first:, None] == document_ids_BT[:, None, :]
    causal = torch.ones(length - first, length, dtype=torch.bool, device=document_ids_BT.device).tril(first)
    return (same & causal)[:, None]
