"""Whole runs with tables sharded over 1, 2 and 4 ranks (and experts over 2) against one process with a dense embedding
and torch.optim.Adam: logits, gradients, and ten clipped steps.

Ranks count different numbers of tokens, ask for the same rows, and accumulate two microbatches.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
from dense_run import dense_run, expert_biases, largest_difference, relative_difference, whole_table
from ranks import run_ranks
from small_run import build_small_run, finished_table, global_batch, microbatches, numbers, small_run_config

from engram_megatron.layouts.compare import live

STEPS = 10
LAYOUTS = [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2)]  # (ranks, expert-parallel size)
FLOAT32_LAYOUTS = [(2, 2), (4, 1)]
# Float64 rounding is 1e-16, of sums of 1e3 terms and a few hundred operations in a row 1e-14 in a gradient. Two things
# enlarge it from step to step: Newton-Schulz multiplies the noise of small singular values by up to 3.4445^5 = 485, and
# the gate's root has a slope of 0.5 / sqrt(score), which a score that happens to be 1e-4 makes steep (without the gate
# nothing grows; at 5 times this learning rate and ten steps, 1e-15 becomes 1e-5). 1e-9 leaves room for both.
FLOAT64 = 1e-9
# In float32 a token may take another expert in one of two correct runs: with all experts chosen none can.
ALL_EXPERTS = ("model.moe.top_k=4",)


def _sharded(rank: int, world_size: int, config: Any) -> dict[str, Any]:
    """What this rank sees: logits of its microbatches before the first step, and every step's numbers."""
    import torch

    from engram_megatron.model.parameter_names import global_named_parameters
    from engram_megatron.training.forward_step import make_microbatch

    run = build_small_run(config, rank, world_size)
    layout = run.memory.lookup.layout
    applied: dict[str, Any] = {}
    memory_step = run.memory.step

    def record(gradients: Any, learning_rate: float, scale: float) -> None:
        applied["rows"] = layout.global_row(rank, gradients.local_rows)
        applied["values"] = gradients.gradients * scale
        memory_step(gradients, learning_rate, scale)

    run.memory.step = record
    batches = microbatches(global_batch(0), rank, world_size)
    logits = []
    with torch.no_grad():
        rows = run.memory.plan(batches)
        run.memory.fetch(rows)
        run.chunks[0].eval()
        for index, batch in enumerate(batches):
            m = make_microbatch(
                batch, run.memory.of_microbatch(rows, index), separate_documents=True, cut_memory_at_documents=True
            )
            out = run.chunks[0](m.tokens_BT, m.document_ids_BT, m.memory_LTBE, m.memory_document_ids_BT)
            logits.append(numbers(out))
        run.chunks[0].train()
    steps = []
    for step in range(STEPS):
        batches = microbatches(global_batch(step), rank, world_size)
        result = run.trainer.train_step(step, batches, stop_requested=False)
        gradient = {name: numbers(p.main_grad) for name, p in global_named_parameters(run.chunks)}
        steps.append({"result": result, "gradient": gradient, "rows": dict(applied)})
    owned = layout.global_row(rank, np.arange(run.memory.shard.num_rows))
    return {
        "logits": np.concatenate(logits),
        "steps": steps,
        "parameters": {name: numbers(p) for name, p in global_named_parameters(run.chunks)},
        "table": (owned, finished_table(run.memory)),
        "expert_bias": expert_biases(run.chunks),
        "used_rows": [np.unique(run.memory.hasher.rows(batch.tokens, batch.document_ids)) for batch in batches],
    }


def _layouts(rank: int, world_size: int) -> dict[tuple[str, int], dict[str, Any]]:
    """By (dtype, expert-parallel size)."""
    results = {}
    for _, expert in (layout for layout in LAYOUTS if layout[0] == world_size):
        parallel = f"parallel.expert={expert}"
        results["float64", expert] = _sharded(rank, world_size, small_run_config("float64", [parallel]))
        if (world_size, expert) in FLOAT32_LAYOUTS:
            config = small_run_config("float32", [parallel, *ALL_EXPERTS])
            results["float32", expert] = _sharded(rank, world_size, config)
    return results


def _references(rank: int, world_size: int) -> dict[str, Any]:
    return {
        "float64": dense_run(rank, world_size, small_run_config("float64"), STEPS),
        "float64, all experts": dense_run(rank, world_size, small_run_config("float64", ALL_EXPERTS), STEPS),
        "float32": dense_run(rank, world_size, small_run_config("float32", ALL_EXPERTS), STEPS),
    }


@cache
def _run_all(world_size: int) -> list[dict[tuple[str, int], dict[str, Any]]]:
    return run_ranks(_layouts, world_size)


def _run(layout: tuple[int, int], dtype: str = "float64") -> list[dict[str, Any]]:
    """What each rank saw."""
    world_size, expert = layout
    return [of_rank[dtype, expert] for of_rank in _run_all(world_size)]


@cache
def _dense() -> dict[str, Any]:
    return run_ranks(_references, 1)[0]


def _merge(parts: list[dict[str, np.ndarray]], of_ranks: str) -> dict[str, np.ndarray]:
    """The whole model from all ranks' parts; a parameter that several ranks hold must be bit-identical on them."""
    merged: dict[str, np.ndarray] = {}
    for part in parts:
        for name, value in part.items():
            np.testing.assert_array_equal(merged.setdefault(name, value), value, err_msg=f"{of_ranks} {name}")
    return merged


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_equal_the_dense_model(layout: tuple[int, int]) -> None:
    logits = np.concatenate([rank["logits"] for rank in _run(layout)])
    assert relative_difference(logits, _dense()["float64"]["logits"]) < FLOAT64


@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_and_gradients_of_every_step_equal_the_dense_model(layout: tuple[int, int]) -> None:
    ranks = [rank["steps"] for rank in _run(layout)]
    for step, expected in enumerate(_dense()["float64"]["steps"]):
        of_ranks = [steps[step] for steps in ranks]
        for one in of_ranks:
            assert one["result"].loss == pytest.approx(expected["loss"], rel=FLOAT64)
            assert one["result"].num_tokens == expected["num_tokens"]
        gradient = live(_merge([one["gradient"] for one in of_ranks], "gradient"))
        assert largest_difference(gradient, live(expected["gradient"])) < FLOAT64
        rows = [(one["rows"]["rows"], one["rows"]["values"]) for one in of_ranks]
        table = whole_table(rows, expected["table_gradient"], 0.0)
        assert relative_difference(table, expected["table_gradient"]) < FLOAT64


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ten_steps_equal_the_dense_model(layout: tuple[int, int]) -> None:
    ranks, expected = _run(layout), _dense()["float64"]
    parameters = live(_merge([rank["parameters"] for rank in ranks], "parameter"))
    assert largest_difference(parameters, live(expected["parameters"])) < FLOAT64
    table = whole_table([rank["table"] for rank in ranks], expected["table"], np.nan)
    assert relative_difference(table, expected["table"]) < FLOAT64
    biases = _merge([rank["expert_bias"] for rank in ranks], "expert bias")
    assert largest_difference(biases, expected["expert_bias"]) == 0.0


def _moved(parameters: dict[str, np.ndarray], table: np.ndarray, start: dict[str, Any]) -> np.ndarray:
    """How far everything moved from the start, as one float64 vector."""
    parameters, initial = live(parameters), live(start["initial"])
    parts = [parameters[name].astype(np.float64) - initial[name] for name in initial]
    return np.concatenate([part.ravel() for part in [*parts, table.astype(np.float64) - start["initial_table"]]])


@pytest.mark.parametrize("layout", FLOAT32_LAYOUTS)
def test_ten_steps_in_float32_are_as_close_to_float64_as_the_dense_model_is(layout: tuple[int, int]) -> None:
    """The bound is measured, not guessed: e = how far float32 takes the dense model from float64, relative to the
    distance travelled. A run that does the same in another order of sums has other rounding errors of the same size:
    it ends about e from the truth. Five times e allows for the luck of single tokens whose gate is steep. e itself must
    be small for this to say anything: the gradient's relative noise is about 1e-6, of which the gate and Newton-Schulz
    multiply some by 100 and more."""
    dense, ranks = _dense(), _run(layout, "float32")
    truth = dense["float64, all experts"]
    exact = _moved(truth["parameters"], truth["table"], truth)
    rounded = _moved(dense["float32"]["parameters"], dense["float32"]["table"], truth)
    ours = _moved(
        _merge([rank["parameters"] for rank in ranks], "parameter"),
        whole_table([rank["table"] for rank in ranks], dense["float32"]["table"], np.nan),
        truth,
    )
    e = np.linalg.norm(rounded - exact) / np.linalg.norm(exact)
    assert 1e-8 < e < 1e-3
    assert np.linalg.norm(ours - exact) / np.linalg.norm(exact) < 5 * e


def test_cases_that_the_comparison_promises_do_occur() -> None:
    used = [np.concatenate(rank["used_rows"]) for rank in _run((4, 1))]
    assert np.intersect1d(used[0], used[3]).size > 10, "rows that several ranks ask for"
    first, second = _run((1, 1))[0]["used_rows"]
    assert np.intersect1d(first, second).size > 10, "rows that two microbatches ask for"
    tokens = [[batch.loss_mask.sum() for batch in microbatches(global_batch(0), rank, 4)] for rank in range(4)]
    assert len({sum(counts) for counts in tokens}) == 4, "ranks that count different numbers of tokens"
    assert all(step["norm"] > small_run_config().optimizer.clip_grad_norm for step in _dense()["float64"]["steps"])
    assert all(any((bias != 0).tolist()) for bias in _dense()["float64"]["expert_bias"].values()), "biases that moved"
