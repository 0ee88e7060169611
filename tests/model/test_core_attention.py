"""Core attention of divided queries against attention written out, and FlexAttention's masks against dense ones."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ranks import run_ranks

from engram_megatron.model.document_attention import document_block_mask, document_mask_function

T, B, N, D, V = 24, 2, 2, 6, 4
SCALE = 0.37


def _inputs() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    return tuple(torch.randn(T, B, N, size, generator=generator, dtype=torch.float64) for size in (D, D, V, V))


def _documents(length: int = T) -> torch.Tensor:
    """Rising ids [2, length]: documents of 1, 4, 7 and more positions, and one that spans almost all."""
    ids = torch.zeros(B, length, dtype=torch.int32)
    ids[0, [1, 5, 12, length // 2 + 1]] = 1
    ids[1, length - 3] = 1
    return ids.cumsum(1).int()


def _written_out(documents: torch.Tensor | None) -> tuple[Any, ...]:
    """Softmax attention, and the gradients of its inputs for a loss that weighs every output differently."""
    query, key, value, weight = (x.clone().requires_grad_() for x in _inputs())
    scores = torch.einsum("ibnd,jbnd->bnij", query, key) * SCALE
    sees = torch.ones(T, T).tril().bool()[None, None]
    if documents is not None:
        sees = sees & (documents[:, None, :, None] == documents[:, None, None, :])
    probabilities = scores.masked_fill(~sees, -torch.inf).softmax(-1)
    output = torch.einsum("bnij,jbnv->ibnv", probabilities, value)
    (output * weight).sum().backward()
    return output.flatten(2).detach(), query.grad, key.grad, value.grad


def _divided(rank: int, world_size: int, contexts: list[int]) -> dict[tuple[int, bool], Any]:
    """Of all context ranks, one after the other: the module needs no other rank."""
    from engram_megatron.model.core_attention import CausalCoreAttention
    from engram_megatron.model.sequence_partition import SequencePartition

    found = {}
    for context in contexts:
        for apart in (False, True):
            query, key, value, weight = (x.clone().requires_grad_() for x in _inputs())
            output = torch.zeros(T, B, N * V, dtype=torch.float64)
            for context_rank in range(context):
                config = SimpleNamespace(context_parallel_size=context, attention_dropout=0.0)
                groups = SimpleNamespace(cp=SimpleNamespace(rank=lambda context_rank=context_rank: context_rank))
                attention = CausalCoreAttention(config, SCALE, groups)
                mine = SequencePartition(context=context).context_positions(T, context_rank)
                part = attention(query[mine], key, value, _documents() if apart else None)
                (part * weight[mine].flatten(2)).sum().backward()
                output[mine] = part.detach()
            found[context, apart] = tuple(x.numpy() for x in (output, query.grad, key.grad, value.grad))
    return found


def test_divided_queries_attend_as_whole_ones_do() -> None:
    for (context, apart), tensors in run_ranks(_divided, 1, [1, 2, 3, 4])[0].items():
        expected = _written_out(_documents() if apart else None)
        for found, value in zip(tensors, expected, strict=True):
            error = (torch.from_numpy(found) - value).abs().max() / value.abs().max()
            assert error < 1e-13, (context, apart)  # a softmax over 24 keys in float64


# Blocks that divide the length, and that do not; queries of the whole sequence, of its second half, of a few.
SHAPES = [(96, 96, 16), (96, 48, 16), (90, 90, 16), (90, 40, 16), (90, 5, 16), (33, 33, 64)]


@pytest.mark.parametrize(("length", "num_queries", "block"), SHAPES)
def test_block_mask_is_the_one_that_every_pair_of_positions_gives(length: int, num_queries: int, block: int) -> None:
    from torch.nn.attention.flex_attention import create_block_mask

    documents = _documents(length)
    mask = document_block_mask(documents, num_queries, block)
    function = document_mask_function(documents, num_queries)
    expected = create_block_mask(function, B, None, num_queries, length, device="cpu", BLOCK_SIZE=block)
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        torch.testing.assert_close(getattr(mask, name), getattr(expected, name), msg=name)
    for numbers, indices in (("kv_num_blocks", "kv_indices"), ("full_kv_num_blocks", "full_kv_indices")):
        assert _listed(mask, numbers, indices) == _listed(expected, numbers, indices)
    torch.testing.assert_close(mask.to_dense(), expected.to_dense())
    assert mask.seq_lengths == expected.seq_lengths == (num_queries, length)
    if num_queries > 2 * block:
        assert mask.full_kv_num_blocks.sum() > 0, "some blocks are seen as a whole"


def _listed(mask: Any, numbers: str, indices: str) -> list[list[int]]:
    counts, blocks = getattr(mask, numbers).flatten(), getattr(mask, indices).flatten(0, 2)
    return [row[:count].tolist() for row, count in zip(blocks, counts.tolist(), strict=True)]


def _masks(rank: int, world_size: int) -> None:
    from torch.nn.attention.flex_attention import create_mask

    from engram_megatron.model.core_attention import causal_attention, same_document_causal_mask
    from engram_megatron.model.document_attention import document_attention

    documents = _documents()
    query, key, value, _ = (x.permute(1, 2, 0, 3) for x in _inputs())
    for first in (0, 6, 18):
        function = document_mask_function(documents, T - first)
        created = create_mask(function, B, None, T - first, T, device="cpu")
        torch.testing.assert_close(created, same_document_causal_mask(documents, first))
        flexible = document_attention(query[:, :, first:], key, value, documents, SCALE)
        dense = causal_attention(query[:, :, first:], key, value, documents, first, SCALE)
        torch.testing.assert_close(flexible, dense, rtol=0, atol=1e-13)


def test_flex_attention_sees_what_the_dense_mask_lets_it_see() -> None:
    run_ranks(_masks, 1)
