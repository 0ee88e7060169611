"""The router against megatron-core's, which it replaces, and against the formula in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from ranks import run_ranks
from small_run import numbers, small_groups, small_run_config


def _routed(rank: int, world_size: int, dtype: str) -> dict[str, Any]:
    import torch
    from megatron.core.transformer.moe.router import TopKRouter

    from engram_megatron.model.backbone_config import TORCH_DTYPE
    from engram_megatron.model.builder import build_model_chunks

    config = small_run_config("float64" if dtype == "float64" else "float32", [f"training.dtype={dtype}"])
    small_groups(config, rank, world_size)
    (model,) = build_model_chunks(config)
    router: Any = model.decoder.layers[1].mlp.router
    torch.manual_seed(0)
    logits_TBE = torch.randn(40, 3, 4).to(TORCH_DTYPE[dtype]).requires_grad_()
    router.expert_bias.copy_(torch.tensor([0.0, 0.3, -0.2, 0.1]))
    found: dict[str, Any] = {"logits": numbers(logits_TBE.float() if dtype == "bfloat16" else logits_TBE)}
    for name, route in (("ours", router.routing), ("megatron", lambda x: TopKRouter.routing(router, x))):
        router.local_tokens_per_expert.zero_()
        weights_NE, choice_NE = route(logits_TBE)
        logits_TBE.grad = None
        (weights_NE.float() if dtype == "bfloat16" else weights_NE).square().sum().backward()
        gradient = logits_TBE.grad
        found[name] = [
            numbers(t.float() if t.dtype == torch.bfloat16 else t)
            for t in (weights_NE, choice_NE, gradient, router.local_tokens_per_expert)
        ]
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_routes_as_megatron_core_does_to_the_last_bit(dtype: str) -> None:
    found = run_ranks(_routed, 1, dtype)[0]
    for ours, theirs in zip(found["ours"], found["megatron"], strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_float64_weights_are_those_of_the_formula() -> None:
    found = run_ranks(_routed, 1, "float64")[0]
    weights_NE, choice_NE, _, counts = found["ours"]
    scores_NE = 1 / (1 + np.exp(-found["logits"].reshape(-1, 4)))
    # The bias is a float32 buffer; its values are not exact in binary.
    order = np.argsort(-(scores_NE + np.float32([0.0, 0.3, -0.2, 0.1]).astype(np.float64)), axis=1)[:, :2]
    expected = np.zeros_like(scores_NE)
    np.put_along_axis(expected, order, np.take_along_axis(scores_NE, order, 1), 1)
    expected *= 2.5 / expected.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(weights_NE, expected, rtol=1e-14)
    np.testing.assert_array_equal(choice_NE, expected > 0)
    np.testing.assert_array_equal(counts, choice_NE.sum(axis=0))
    assert np.abs(weights_NE - found["megatron"][0]).max() > 1e-9, "megatron-core's own is in float32"
