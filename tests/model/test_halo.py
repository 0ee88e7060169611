"""Slices of a sequence with their halos, on several ranks, against the whole sequence on one."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from ranks import run_ranks

T, B, M, C, E, K, DILATION = 24, 2, 2, 4, 6, 4, 3
HALO = (K - 1) * DILATION
# Documents that end in a halo, at a border of slices, and one that spans several slices.
STARTS = ([5, 11, 12], [17])


class Case(NamedTuple):
    world_size: int
    documents: bool


# Slices of 12, 8, 6 and 3 positions: longer than the halo of 9, and one, two and three ranks shorter than it.
CASES = [Case(size, documents) for size in (2, 3, 4, 8) for documents in (False, True)]


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


def _layer(group: Any) -> Any:
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
        sequence_group=group,
    )
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return layer


def _run(layer: Any, part: slice, documents: bool) -> dict[str, np.ndarray[Any, Any]]:
    """Output of a slice, and gradients of its inputs and of the parameters."""
    inputs = _inputs()
    hidden, memory = (inputs[name][part].clone().requires_grad_() for name in ("hidden", "memory"))
    output = layer(hidden, memory, inputs["documents"] if documents else None)
    (output * inputs["weights"][part]).sum().backward()
    found = {"output": output.detach(), "hidden": hidden.grad, "memory": memory.grad}
    found |= {name: parameter.grad for name, parameter in layer.named_parameters()}
    return {name: value.numpy() for name, value in found.items()}


def _sliced(rank: int, world_size: int) -> dict[bool, dict[str, Any]]:
    import torch.distributed as dist

    layer, share = _layer(dist.group.WORLD), T // world_size
    found = {}
    for documents in (False, True):
        layer.zero_grad()
        found[documents] = _run(layer, slice(rank * share, (rank + 1) * share), documents)
    return found


@cache
def _ranks(world_size: int) -> list[dict[bool, dict[str, Any]]]:
    return run_ranks(_sliced, world_size)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_sliced_layer_is_the_whole_one(case: Case) -> None:
    expected = _run(_layer(None), slice(None), case.documents)
    found = [rank[case.documents] for rank in _ranks(case.world_size)]
    for name, value in expected.items():
        of_ranks = [one[name] for one in found]
        along_sequence = name in ("output", "hidden", "memory")
        whole = np.concatenate(of_ranks) if along_sequence else sum(of_ranks)
        # Sums of a few hundred terms in float64, in another order.
        np.testing.assert_allclose(whole, value, rtol=0, atol=1e-12 * np.abs(value).max(), err_msg=name)


def _halos(rank: int, world_size: int, sizes: list[int]) -> list[Any]:
    import torch.distributed as dist

    from engram_megatron.model.halo import left_halo

    share = T // world_size
    mine = torch.arange(rank * share, (rank + 1) * share, dtype=torch.float64)
    return [left_halo(mine, size, dist.group.WORLD).tolist() for size in sizes]


def test_halo_is_what_stands_before_the_slice_and_ends_at_the_sequence_start() -> None:
    sizes = [0, 1, 5, 6, 7, 18, 100]
    for rank, found in enumerate(run_ranks(_halos, 4, sizes)):
        start = rank * T // 4
        assert found == [[float(p) for p in range(max(0, start - size), start)] for size in sizes]


def test_document_ids_matter_in_these_cases() -> None:
    apart, across = (_run(_layer(None), slice(None), documents)["output"] for documents in (True, False))
    changed = np.abs(apart - across).max(axis=(1, 2, 3)) > 1e-6
    assert changed[12 : 12 + HALO].any(), "behind the border of two slices"
