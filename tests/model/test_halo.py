"""Pieces of a sequence with their halos, on several ranks, against the whole sequence on one."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from ranks import run_ranks

from engram_megatron.model.sequence_partition import SequencePartition

T, B, M, C, E, K, DILATION = 24, 2, 2, 4, 6, 4, 3
HALO = (K - 1) * DILATION
# Documents that end in a halo, at a border of slices, and one that spans several slices.
STARTS = ([5, 11, 12], [17])


class Case(NamedTuple):
    context: int
    tensor: int
    documents: bool


# Pieces of 12, 8, 6 and 3 positions without context parallelism, of 6, 4, 3, 3 and 2 with it: longer than the halo of
# 9, and up to five times shorter.
SIZES = [(1, 2), (1, 3), (1, 4), (1, 8), (2, 1), (3, 1), (4, 1), (2, 2), (2, 3)]
CASES = [Case(*sizes, documents) for sizes in SIZES for documents in (False, True)]


def _inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    ids = torch.zeros(B, T, dtype=torch.int32)
    for row, starts in enumerate(STARTS):
        ids[row, starts] = 1
    return {
        "hidden": draw(T, B, M, C),
        "memory": draw(T, B, E),
        "weights": draw(T, B, M, C),  # of the loss: every position of the output matters differently
        "documents": ids.cumsum(1).int(),
    }


def _layer(partition: SequencePartition, group: Any) -> Any:
    from engram_megatron.model.engram_layer import EngramLayer

    layer = EngramLayer(
        hidden_size=C,
        memory_dim=E,
        num_streams=M,
        conv_kernel_size=K,
        conv_dilation=DILATION,
        gate=True,
        conv=True,
        bias=True,
        norm_eps=1e-20,
        conv_norm_eps=1e-5,
        init_std=0.5,
        dtype=torch.float64,
        partition=partition,
        sequence_group=group,
    )
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return layer


def _run(layer: Any, part: Any, documents: bool) -> dict[str, np.ndarray[Any, Any]]:
    """Output of the positions `part`, and gradients of its inputs and of the parameters."""
    inputs = _inputs()
    hidden, memory = (inputs[name][part].clone().requires_grad_() for name in ("hidden", "memory"))
    output = layer(hidden, memory, inputs["documents"] if documents else None)
    (output * inputs["weights"][part]).sum().backward()
    found = {"output": output.detach(), "hidden": hidden.grad, "memory": memory.grad}
    found |= {name: parameter.grad for name, parameter in layer.named_parameters()}
    return {name: value.numpy() for name, value in found.items()}


def _divided(rank: int, world_size: int, sizes: list[tuple[int, int]]) -> dict[Case, dict[str, Any]]:
    import torch.distributed as dist

    found = {}
    for context, tensor in sizes:
        partition = SequencePartition(context=context, tensor=tensor)
        layer = _layer(partition, dist.group.WORLD)
        for documents in (False, True):
            layer.zero_grad()
            positions = partition.positions(T, rank)
            found[Case(context, tensor, documents)] = _run(layer, positions, documents)
    return found


@cache
def _ranks(world_size: int) -> list[dict[Case, dict[str, Any]]]:
    return run_ranks(_divided, world_size, [sizes for sizes in SIZES if sizes[0] * sizes[1] == world_size])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_divided_layer_is_the_whole_one(case: Case) -> None:
    expected = _run(_layer(SequencePartition(), None), slice(None), case.documents)
    partition = SequencePartition(context=case.context, tensor=case.tensor)
    found = [rank[case] for rank in _ranks(partition.num_ranks)]
    order = np.argsort(np.concatenate([partition.positions(T, rank) for rank in range(partition.num_ranks)]))
    for name, value in expected.items():
        of_ranks = [one[name] for one in found]
        along_sequence = name in ("output", "hidden", "memory")
        whole = np.concatenate(of_ranks)[order] if along_sequence else sum(of_ranks)
        # Sums of a few hundred terms in float64, in another order.
        np.testing.assert_allclose(whole, value, rtol=0, atol=1e-12 * np.abs(value).max(), err_msg=name)


def _halos(rank: int, world_size: int, context: int, sizes: list[int]) -> list[Any]:
    import torch.distributed as dist

    from engram_megatron.model.halo import left_halo

    partition = SequencePartition(context=context, tensor=world_size // context)
    mine = torch.from_numpy(partition.positions(T, rank) + 1.0)
    return [left_halo(mine, size, partition, dist.group.WORLD).tolist() for size in sizes]


@pytest.mark.parametrize("context", [1, 2, 4])
def test_halo_is_what_stands_before_each_piece_and_zero_before_the_sequence(context: int) -> None:
    sizes = [0, 1, 3, 5, 7, 18, 30]
    partition = SequencePartition(context=context, tensor=4 // context)
    for rank, found in enumerate(run_ranks(_halos, 4, context, sizes)):
        starts = partition.piece_starts(T, rank)
        for size, halo in zip(sizes, found, strict=True):
            assert halo == [[max(start - size + i + 1.0, 0.0) for start in starts] for i in range(size)]


def test_document_ids_matter_in_these_cases() -> None:
    apart, across = (
        _run(_layer(SequencePartition(), None), slice(None), documents)["output"] for documents in (True, False)
    )
    changed = np.abs(apart - across).max(axis=(1, 2, 3)) > 1e-6
    assert changed[12 : 12 + HALO].any(), "behind the border of two slices"
