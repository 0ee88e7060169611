"""Attention inside documents on GPUs, by PyTorch's FlexAttention: without a dense mask, and without the work that a
mask would throw away.

The tests compare masks and eager outputs with the dense mask on a CPU; the compiled kernels have not run on a GPU here.

Shape legend: T keys, Q queries at their last Q positions, B sequences, N heads, D query/key width, V value width;
K and J blocks of keys and of queries.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

BLOCK = 128  # positions of a block of the mask, FlexAttention's default

# Fused into one kernel on a GPU. torch compiles at the first call.
_flex_attention = torch.compile(flex_attention)

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def document_attention(
    query_BNQD: Tensor, key_BNTD: Tensor, value_BNTV: Tensor, document_ids_BT: Tensor, scale: float
) -> Tensor:
    """Attended values [B, N, Q, V]: a query sees the keys of its document up to its own position.

    `document_ids_BT`: integers that never fall along a sequence.
    """
    mask = document_block_mask(document_ids_BT, query_BNQD.shape[2])
    attended = _flex_attention(query_BNQD, key_BNTD, value_BNTV, block_mask=mask, scale=scale)
    assert isinstance(attended, Tensor)
    return attended


def document_mask_function(document_ids_BT: Tensor, num_queries: int) -> MaskFunction:
    """FlexAttention's `mask_mod`: whether query i (counted from the first query) of sequence b sees key j."""
    first = document_ids_BT.shape[1] - num_queries

    def sees(b: Tensor, _head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (first + i >= j) & (document_ids_BT[b, first + i] == document_ids_BT[b, j])

    return sees


def document_block_mask(document_ids_BT: Tensor, num_queries: int, block: int = BLOCK) -> BlockMask:
    """Which blocks of keys each block of queries sees in part, and which as a whole (a short last block never does).

    Read off the ids at the blocks' ends, because ids never fall: work of T^2 / block^2, where `create_block_mask` asks
    for every pair of positions.
    """
    length = document_ids_BT.shape[1]
    first = length - num_queries
    start_K, end_K = _ends(0, length, block, document_ids_BT.device)
    start_J, end_J = _ends(first, length, block, document_ids_BT.device)
    first_key, last_key = document_ids_BT[:, None, start_K], document_ids_BT[:, None, end_K]
    first_query, last_query = document_ids_BT[:, start_J, None], document_ids_BT[:, end_J, None]
    seen_BJK = (start_K <= end_J[:, None]) & (last_key >= first_query)
    complete_JK = (end_J - start_J == block - 1)[:, None] & (end_K - start_K == block - 1)
    whole_BJK = complete_JK & (end_K <= start_J[:, None]) & (first_key == last_query)
    num_partial, partial = _listed(seen_BJK & ~whole_BJK)
    num_whole, whole = _listed(whole_BJK)
    mask: BlockMask = BlockMask.from_kv_blocks(  # type: ignore[no-untyped-call]
        num_partial,
        partial,
        num_whole,
        whole,
        BLOCK_SIZE=block,
        mask_mod=document_mask_function(document_ids_BT, num_queries),
        seq_lengths=(num_queries, length),
    )
    return mask


def _ends(first: int, stop: int, block: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """First and last position of each block of the positions `first` to `stop` - 1; the last block may be shorter."""
    starts = torch.arange(first, stop, block, device=device)
    return starts, (starts + block - 1).clamp(max=stop - 1)


def _listed(blocks_BJK: Tensor) -> tuple[Tensor, Tensor]:
    """(numbers int32 [B, 1, J], key blocks int32 [B, 1, J, K], the True ones first) for FlexAttention."""
    order = torch.argsort(blocks_BJK.to(torch.int8), dim=-1, descending=True, stable=True)
    return blocks_BJK.sum(dim=-1, dtype=torch.int32)[:, None], order.to(torch.int32)[:, None]
