"""The gradient norm that a run reports and clips by is that of the whole model: every parameter once, every row once,
whatever ranks hold copies of a parameter or asked for a row."""

from functools import cache
from typing import Any

import numpy as np
import pytest
from dense_run import dense_run
from ranks import run_ranks
from small_run import build_small_run, global_batch, microbatches, numbers, small_run_config

# Both are float64 throughout, sums of 1e5 squares in another order.
RELATIVE = 1e-12
LIMITS = (0.0, 0.5, 100.0)  # never clip; clips here; does not clip here


def _step_on_one_rank(rank: int, world_size: int) -> dict[str, Any]:
    return dense_run(rank, world_size, small_run_config(overrides=["optimizer.clip_grad_norm=0.0"]), 1)["steps"][0]


def _first_steps(rank: int, world_size: int) -> dict[tuple[int, float], tuple[float, dict[str, Any]]]:
    """(reported norm, gradients as the optimizer took them) by (expert-parallel size, limit)."""
    from engram_megatron.model.parameter_names import global_named_parameters

    found = {}
    for expert in (1, 2) if world_size > 1 else (1,):
        for limit in LIMITS if expert == world_size else LIMITS[:1]:
            overrides = [f"optimizer.clip_grad_norm={limit}", f"parallel.expert={expert}"]
            run = build_small_run(small_run_config(overrides=overrides), rank, world_size)
            batches = microbatches(global_batch(0), rank, world_size)
            result = run.trainer.train_step(0, batches, stop_requested=False)
            taken = {name: numbers(p.main_grad) for name, p in global_named_parameters(run.chunks)}
            found[expert, limit] = (result.gradient_norm, taken)
    return found


@cache
def _found(world_size: int) -> list[dict[tuple[int, float], tuple[float, dict[str, Any]]]]:
    return run_ranks(_first_steps, world_size)


@cache
def _expected() -> dict[str, Any]:
    step: dict[str, Any] = run_ranks(_step_on_one_rank, 1)[0]
    return step


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_reported_norm_counts_every_gradient_once(world_size: int) -> None:
    step = _expected()
    gradients = [*step["gradient"].values(), step["table_gradient"]]
    norm = np.sqrt(sum(float(np.square(gradient).sum()) for gradient in gradients))
    assert float(np.abs(step["table_gradient"]).max()) > 0
    for of_rank in _found(world_size):
        for reported, _ in of_rank.values():
            assert reported == pytest.approx(norm, rel=RELATIVE)


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("world_size", [1, 2])
def test_gradients_are_scaled_only_beyond_the_limit(world_size: int, limit: float) -> None:
    norm = _expected()["norm"]
    assert 0.5 < norm < 100.0
    factor = 0.5 / (norm + 1e-6) if limit == 0.5 else 1.0
    for of_rank in _found(world_size):
        _, taken = of_rank[world_size, limit]
        for name, gradient in taken.items():
            expected = _expected()["gradient"][name] * factor
            np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-10 * np.abs(expected).max(), err_msg=name)
