"""The backbone's optimizer on a real model: against references on one rank, and equal in every layout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from muon_reference import ReferenceMuon, part_rows
from ranks import run_ranks

LR = 1e-2
# Both optimizers forget a constant factor on all gradients; one that changes from step to step they do not.
SCALES = (1.0, 0.2, 0.6)
ADAM = ("embedding.word_embeddings.weight", "output_layer.weight")


@dataclass
class Trained:
    """What a run leaves: numbers of each step, and this rank's parameters by global name."""

    losses: list[float]
    norms_squared: list[float]
    parameters: dict[str, np.ndarray[Any, Any]]


def _reference_error(rank: int, world_size: int, dtype: str) -> dict[str, float]:
    """Train on one rank beside float64 references that are fed the same gradients; largest error by parameter."""
    from small_gpt import accumulate_gradients, build_small_gpt, global_parameters, small_config

    from engram_megatron.optimizer.backbone import build_backbone_optimizer

    config = small_config(dtype)
    model = build_small_gpt(config)
    optimizer = build_backbone_optimizer([model], config)
    references: dict[str, Any] = {}
    for name, parameter in global_parameters(model):
        references[name] = _Reference(name, parameter)
    for step, scale in enumerate(SCALES):
        optimizer.zero_grad()
        accumulate_gradients(model, step)
        gradients = {name: parameter.main_grad.double().clone() for name, parameter in global_parameters(model)}
        optimizer.prepare_gradients()
        expected = sum(float(gradient.square().sum()) for gradient in gradients.values())
        # One sum in float64 against another: 2e4 terms of either order.
        assert optimizer.gradient_norm_squared() == pytest.approx(expected, rel=1e-12)
        optimizer.step(LR, scale)
        for name, gradient in gradients.items():
            references[name].step(gradient * scale)
    masters = optimizer.state_dict()["state"]
    errors = {}
    for name, parameter in model.named_parameters():
        main = masters[f"chunk0.{name}"].get("master", parameter)
        assert main.dtype == (torch.float64 if dtype == "float64" else torch.float32)
        assert torch.equal(parameter, main.to(parameter.dtype)), name
        bare = name.removeprefix("module.")
        errors[bare] = float((main.double() - references[bare].weight).abs().max())
    return errors


class _Reference:
    """Moonlight's Muon or torch's AdamW in float64 on a copy of the weight, chosen by hand."""

    def __init__(self, name: str, parameter: torch.Tensor):
        weight = parameter.detach().double().clone()
        self.muon = self.adam = None
        if weight.ndim == 2 and name not in ADAM:
            self.muon = ReferenceMuon(weight, part_rows(name, len(weight), heads=2, nope=12, value=16, kv_rank=16))
        else:
            self.leaf = weight.clone().requires_grad_()
            decay = 0.1 if name in ADAM else 0.0
            self.adam = torch.optim.AdamW([self.leaf], lr=LR, betas=(0.9, 0.95), eps=1e-20, weight_decay=decay)

    def step(self, gradient: torch.Tensor) -> None:
        if self.muon is not None:
            self.muon.step(gradient, LR)
        else:
            assert self.adam is not None
            self.leaf.grad = gradient.clone()
            self.adam.step()

    @property
    def weight(self) -> torch.Tensor:
        return self.muon.weight if self.muon is not None else self.leaf.detach()


# Muon: at most lr * 485 * eps * 0.2 sqrt(rows) * steps (see test_muon), 1e-13 for float64 and 2e-5 for float32.
# Adam: lr * a few eps, and eps of weights of order 1. A wrong rule, split or clip factor moves weights by 1e-3.
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("bfloat16", 2e-5)])
def test_steps_follow_moonlight_and_adamw(dtype: str, tolerance: float) -> None:
    (errors,) = run_ranks(_reference_error, 1, dtype)
    assert len(errors) > 30
    assert max(errors.values()) < tolerance, max(errors.items(), key=lambda item: item[1])


def _train(rank: int, world_size: int, tensor: int, expert: int) -> Trained:
    from small_gpt import accumulate_gradients, build_small_gpt, global_parameters, small_config

    from engram_megatron.optimizer.backbone import build_backbone_optimizer

    config = small_config("float64", tensor=tensor, expert=expert)
    model = build_small_gpt(config)
    optimizer = build_backbone_optimizer([model], config)
    losses, norms = [], []
    for step, scale in enumerate(SCALES):
        optimizer.zero_grad()
        losses.append(accumulate_gradients(model, step))
        optimizer.prepare_gradients()
        norms.append(optimizer.gradient_norm_squared())
        optimizer.step(LR, scale)
    return Trained(losses, norms, {n: p.detach().numpy().copy() for n, p in global_parameters(model)})


@pytest.fixture(scope="module")
def one_rank() -> Trained:
    (trained,) = run_ranks(_train, 1, 1, 1)
    return trained


# Data and expert parallelism change the order of float64 sums only. Under tensor parallelism megatron-core's cross
# entropy, always float32, sums its exponentials in another order: 1e-7 of each loss, amplified by three Muon steps.
@pytest.mark.parametrize(
    ("tensor", "expert", "tolerance"),
    [(1, 1, 1e-11), (1, 2, 1e-11), (2, 1, 1e-5), (2, 2, 1e-5)],
    ids=["data", "expert", "tensor", "tensor_expert"],
)
def test_two_ranks_train_as_one_does(one_rank: Trained, tensor: int, expert: int, tolerance: float) -> None:
    ranks = run_ranks(_train, 2, tensor, expert)
    for trained in ranks:
        np.testing.assert_allclose(trained.losses, one_rank.losses, rtol=tolerance)
        np.testing.assert_allclose(trained.norms_squared, one_rank.norms_squared, rtol=tolerance)
    names = {name for trained in ranks for name in trained.parameters}
    assert names == set(one_rank.parameters)
    for name, whole in one_rank.parameters.items():
        for rank, trained in enumerate(ranks):
            if name in trained.parameters:
                mine = trained.parameters[name]
                np.testing.assert_allclose(mine, _shard(name, whole, mine.shape, rank), atol=tolerance, err_msg=name)


def _shard(name: str, whole: np.ndarray[Any, Any], shape: tuple[int, ...], rank: int) -> np.ndarray[Any, Any]:
    """What rank `rank` of two holds of a whole weight, told from the shape of what it holds."""
    if whole.shape == shape:
        return whole
    (dim,) = (d for d, (all_, mine) in enumerate(zip(whole.shape, shape, strict=True)) if all_ != mine)
    parts = np.split(whole, 2) if name.endswith("linear_fc1.weight") else [whole]
    return np.concatenate([np.split(part, 2, axis=dim)[rank] for part in parts])


def _gradient_left_behind(rank: int, world_size: int) -> list[bool]:
    from small_gpt import accumulate_gradients, build_small_gpt, small_config

    from engram_megatron.optimizer.backbone import build_backbone_optimizer

    model = build_small_gpt(small_config("float32"))
    optimizer = build_backbone_optimizer([model], small_config("float32"))
    optimizer.zero_grad()
    accumulate_gradients(model, 0)
    optimizer.prepare_gradients()
    optimizer.step(LR)
    left = [parameter.grad is not None for parameter in model.parameters()]
    optimizer.zero_grad()
    return [any(left), any(bool(parameter.main_grad.any()) for parameter in model.parameters())]


def test_nothing_of_a_steps_gradient_reaches_the_next() -> None:
    assert run_ranks(_gradient_left_behind, 1) == [[False, False]]
