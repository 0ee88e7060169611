"""Muon against Moonlight's algorithm in float64, whole, split, stacked and under tensor parallelism."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from muon_reference import ReferenceMuon, orthogonalized
from ranks import run_ranks

from engram_megatron.config_optimizer import OptimizerConfig
from engram_megatron.optimizer.muon import Muon, muon_group, orthogonalize
from engram_megatron.optimizer.parameter_groups import MatrixSplit

# Newton-Schulz multiplies what is small by 3.4445 a step, at most 3.4445^5 = 485 times, rounding errors included. One
# part has Frobenius norm 1 before and spectral norm 1.2 at most after, so an entry of the update 0.2 sqrt(max) X errs
# by at most 485 * eps * (a few products) * 0.2 sqrt(48): below 1e-3 (float32) and 1e-12 (float64), times lr 0.02 and
# 4 steps. A wrong split, scale or momentum moves entries by 1e-2.
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-13}
LR, STEPS = 0.02, 4

# name -> (global shape, split, row numbers of the parts in the reference, partition dimension)
CASES: dict[str, tuple[tuple[int, ...], MatrixSplit | None, list[list[int]] | None, int]] = {
    "wide": ((12, 48), None, None, 1),
    "tall": ((48, 12), None, None, 0),
    "gate and up": (
        (32, 20),
        MatrixSplit(sizes=(16, 16), per_rank=True),
        [list(range(16)), list(range(16, 32))],
        0,
    ),
    "latent and rope": ((24, 20), MatrixSplit(sizes=(18, 6)), [list(range(18)), list(range(18, 24))], 0),
    "keys and values of 4 heads": (
        (40, 16),
        MatrixSplit(sizes=(4, 6), repeats=4),
        [
            [10 * head + i for head in range(4) for i in range(4)],
            [10 * head + i for head in range(4) for i in range(4, 10)],
        ],
        0,
    ),
}


def _random(shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _run_muon(weight: torch.Tensor, gradients: list[torch.Tensor], **layout: Any) -> torch.Tensor:
    parameter = torch.nn.Parameter(weight.clone())
    optimizer = Muon([muon_group([parameter], weight_decay=0.1, **layout)], OptimizerConfig())
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.param_groups[0]["lr"] = LR
        optimizer.step()
    return parameter.detach()


def _run_reference(weight: torch.Tensor, gradients: list[torch.Tensor], rows: list[list[int]] | None) -> torch.Tensor:
    reference = ReferenceMuon(weight, rows)
    for gradient in gradients:
        reference.step(gradient, LR)
    return reference.weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", CASES)
def test_steps_follow_moonlight(case: str, dtype: torch.dtype) -> None:
    shape, split, rows, _ = CASES[case]
    weight, gradients = _random(shape, 0, dtype), [_random(shape, 1 + i, dtype) for i in range(STEPS)]
    ours, expected = _run_muon(weight, gradients, split=split), _run_reference(weight, gradients, rows)
    assert ours.dtype == dtype
    assert (ours.double() - expected).abs().max() < TOLERANCE[dtype]


def test_each_matrix_of_a_stack_is_taken_on_its_own() -> None:
    weight = _random((3, 16, 10), 0, torch.float64)
    # The stack's matrices have gradients of very different size: one norm for all would be far off.
    size = torch.tensor([1.0, 100.0, 0.01], dtype=torch.float64).view(3, 1, 1)
    gradients = [_random((3, 16, 10), 1 + i, torch.float64) * size for i in range(STEPS)]
    ours = _run_muon(weight, gradients, split=MatrixSplit(sizes=(8, 8), per_rank=True))
    for number in range(3):
        rows = [list(range(8)), list(range(8, 16))]
        expected = _run_reference(weight[number], [gradient[number] for gradient in gradients], rows)
        assert (ours[number] - expected).abs().max() < TOLERANCE[torch.float64]


def test_tiny_gradients_are_damped_as_moonlight_damps_them() -> None:
    # Norms near the 1e-7 that Moonlight adds: a momentum kept as an average must not change what they give.
    weight = _random((12, 20), 0, torch.float64)
    gradients = [_random((12, 20), 1 + i, torch.float64) * 1e-9 for i in range(STEPS)]
    difference = _run_muon(weight, gradients) - _run_reference(weight, gradients, None)
    assert difference.abs().max() < TOLERANCE[torch.float64]


def test_zero_gradient_gives_no_update() -> None:
    assert torch.equal(orthogonalize(torch.zeros(3, 4, 5), 5, (3.4445, -4.775, 2.0315), 1e-7), torch.zeros(3, 4, 5))


def test_bfloat16_products_keep_the_direction_and_the_dtype() -> None:
    update = _random((24, 40), 0, torch.float32)
    low = orthogonalize(update, 5, (3.4445, -4.775, 2.0315), 1e-7, torch.bfloat16)
    exact = orthogonalized(update.double())
    assert low.dtype == torch.float32
    # bfloat16 rounds to 2^-9 relative, and the iteration is not contracting: a few per cent of the norm is expected,
    # unrelated matrices would differ by 141 %.
    assert 1e-4 < (low.double() - exact).norm() / exact.norm() < 0.1


def test_float32_precision_setting_of_torch_is_left_alone() -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        _run_muon(_random((4, 4), 0, torch.float32), [_random((4, 4), 1, torch.float32)])
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def _sharded(case: str, rank: int, world_size: int, whole: torch.Tensor) -> torch.Tensor:
    _, split, _, dim = CASES[case]
    per_rank = split is not None and split.per_rank
    parts = whole.chunk(2) if per_rank else (whole,)
    return torch.cat([part.chunk(world_size, dim=dim)[rank] for part in parts])


def _tensor_parallel_error(rank: int, world_size: int) -> dict[str, float]:
    errors = {}
    for case, (shape, split, rows, dim) in CASES.items():
        weight, gradients = _random(shape, 0, torch.float64), [_random(shape, 1 + i, torch.float64) for i in range(4)]
        ours = _run_muon(
            _sharded(case, rank, world_size, weight),
            [_sharded(case, rank, world_size, gradient) for gradient in gradients],
            split=split,
            partition_dim=dim,
            tensor_parallel_group=dist.group.WORLD,
        )
        expected = _sharded(case, rank, world_size, _run_reference(weight, gradients, rows))
        errors[case] = float((ours - expected).abs().max())
    return errors


def test_two_tensor_parallel_ranks_take_the_step_of_one() -> None:
    for errors in run_ranks(_tensor_parallel_error, 2):
        assert errors.keys() == CASES.keys()
        assert max(errors.values()) < TOLERANCE[torch.float64], errors
