"""The loss of logits whose vocabulary is divided over ranks, against torch's on the whole."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from ranks import run_ranks

B, T, V = 3, 5, 24
# A sum of 24 exponentials: a few rounding errors of the dtype.
TOLERANCE = {"float64": 1e-14, "float32": 1e-5, "bfloat16": 1e-2}


def _inputs(dtype: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    logits = torch.randn(B, T, V, generator=generator, dtype=torch.float64) * 3
    logits[0, 0] += 1000.0  # exp overflows unless the largest logit of all ranks is taken off
    logits[0, 1, :20] -= 2000.0  # the target's rank has nothing but vanishing probabilities
    labels = torch.randint(0, V, (B, T), generator=generator)
    labels[0, 1] = 0
    mask = torch.rand(B, T, generator=generator) < 0.7
    mask[0, :2] = True
    return logits.to(getattr(torch, dtype)), labels, mask


def _sharded(rank: int, world_size: int, dtype: str) -> dict[str, Any]:
    import torch.distributed as dist

    from engram_megatron.model.loss import token_loss_sum

    logits, labels, mask = _inputs(dtype)
    share = logits.chunk(world_size, dim=-1)[rank].clone().requires_grad_()
    loss, tokens = token_loss_sum(share, labels, mask, dist.group.WORLD)
    (2 * loss).backward()
    assert share.grad is not None
    assert share.grad.dtype == share.dtype
    return {"loss": loss.item(), "tokens": int(tokens), "gradient": share.grad.double().numpy(), "dtype": loss.dtype}


@cache
def _ranks(world_size: int, dtype: str) -> list[dict[str, Any]]:
    return run_ranks(_sharded, world_size, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_loss_and_gradient_are_those_of_the_whole_vocabulary(world_size: int, dtype: str) -> None:
    logits, labels, mask = _inputs(dtype)
    whole = logits.double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(whole[mask], labels[mask], reduction="sum")
    (2 * expected).backward()
    assert whole.grad is not None
    found = _ranks(world_size, dtype)
    for one in found:
        assert one["dtype"] == (torch.float64 if dtype == "float64" else torch.float32)
        assert one["tokens"] == int(mask.sum())
        assert one["loss"] == found[0]["loss"], "all ranks hold the same loss, to the bit"
        assert one["loss"] == pytest.approx(expected.item(), rel=TOLERANCE[dtype])
    gradient = np.concatenate([one["gradient"] for one in found], axis=-1)
    np.testing.assert_allclose(gradient, whole.grad.numpy(), rtol=0, atol=2 * TOLERANCE[dtype])
