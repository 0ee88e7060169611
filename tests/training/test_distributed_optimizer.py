"""Whole runs with the distributed optimizer, over data, tensor, expert, context and pipeline ranks, against one
process that holds everything: loss, clip norm, five optimizer steps, tables. And runs that switch it at a resume."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from dense_run import dense_run, relative_difference, whole_table
from ranks import run_ranks, slow_above_two
from small_run import build_small_run, finished_table, global_batch, microbatches, numbers, small_run_config
from tiny_run import Start, backbone, run_starts, tables, tiny_config, train_losses

from engram_megatron.layouts.compare import live

STEPS = 5
# See test_against_dense_model for what enlarges float64's 1e-16 to less than this.
FLOAT64 = 1e-9


class Layout(NamedTuple):
    ranks: int
    tensor: int = 1
    expert: int = 1
    context: int = 1
    pipeline: int = 1
    virtual_pipeline: int = 1

    @property
    def overrides(self) -> list[str]:
        return [f"parallel.{name}={value}" for name, value in self._asdict().items() if name != "ranks"]


LAYOUTS = [
    Layout(2),
    Layout(2, expert=2),
    Layout(4),
    Layout(4, expert=2),
    Layout(4, tensor=2),
    Layout(4, tensor=2, expert=2),
    Layout(4, context=2),
    Layout(4, pipeline=2, virtual_pipeline=2),
]


def _config(*overrides: str) -> Any:
    return small_run_config("float64", ["model.num_layers=4", *overrides])


def _reference(rank: int, world_size: int) -> dict[str, Any]:
    return dense_run(rank, world_size, _config(), STEPS)


@cache
def _dense() -> dict[str, Any]:
    return run_ranks(_reference, 1)[0]


def _train(rank: int, world_size: int, config: Any, expected: dict[str, Any]) -> dict[str, Any]:
    """Results of each step, the largest difference of this rank's parameters, the parameters and the tables."""
    from engram_megatron.model.parameter_names import global_named_parameters
    from engram_megatron.model.tensor_shard import take_shard

    run = build_small_run(config, rank, world_size)
    results = []
    for step in range(STEPS):
        mine = microbatches(global_batch(step), run.ranks.data_rank, run.ranks.data_ranks)
        results.append(run.trainer.train_step(step, mine, stop_requested=False))
    named = dict(global_named_parameters(run.chunks))
    wanted = {name: numbers(take_shard(name, p, torch.from_numpy(expected[name]))) for name, p in named.items()}
    parameters = {name: numbers(parameter) for name, parameter in named.items()}
    ours, theirs = live(parameters), live(wanted)
    layout = run.memory.lookup.layout
    owned = layout.global_row(rank, np.arange(run.memory.shard.num_rows))
    return {
        "results": results,
        "difference": max(relative_difference(ours[name], theirs[name]) for name in ours),
        "parameters": parameters,
        "tensor_rank": run.ranks.tensor_rank,
        "table": (owned, finished_table(run.memory)),
        "state_bytes": sum(
            tensor.nbytes for state in run.optimizer.state_dict()["state"].values() for tensor in state.values()
        ),
    }


def _layouts(rank: int, world_size: int, expected: dict[str, Any]) -> dict[Layout, dict[str, Any]]:
    return {
        layout: _train(rank, world_size, _config("parallel.distributed_optimizer=true", *layout.overrides), expected)
        for layout in LAYOUTS
        if layout.ranks == world_size
    }


@cache
def _run_all(world_size: int) -> list[dict[Layout, dict[str, Any]]]:
    return run_ranks(_layouts, world_size, _dense()["parameters"], timeout_s=300.0)


def _run(layout: Layout) -> list[dict[str, Any]]:
    """What each rank saw."""
    return [of_rank[layout] for of_rank in _run_all(layout.ranks)]


@pytest.mark.parametrize("layout", slow_above_two(LAYOUTS), ids=str)
def test_loss_and_clip_norm_equal_those_of_one_rank(layout: Layout) -> None:
    for rank in _run(layout):
        for result, expected in zip(rank["results"], _dense()["steps"], strict=True):
            assert result.loss == pytest.approx(expected["loss"], rel=FLOAT64)
            assert result.gradient_norm == pytest.approx(expected["norm"], rel=FLOAT64)
    clip = small_run_config().optimizer.clip_grad_norm
    assert all(step["norm"] > clip for step in _dense()["steps"]), "gradients are clipped"


@pytest.mark.parametrize("layout", slow_above_two(LAYOUTS), ids=str)
def test_five_steps_lead_where_those_of_one_rank_lead(layout: Layout) -> None:
    ranks = _run(layout)
    assert max(rank["difference"] for rank in ranks) < FLOAT64
    expected = _dense()["table"]
    table = whole_table([rank["table"] for rank in ranks], expected, np.nan)
    assert relative_difference(table, expected) < FLOAT64


@pytest.mark.parametrize("layout", slow_above_two(LAYOUTS), ids=str)
def test_replicas_hold_the_same_parameters_bit_for_bit(layout: Layout) -> None:
    seen: dict[tuple[str, int], Any] = {}
    for rank in _run(layout):
        for name, value in rank["parameters"].items():  # layers and experts by their global numbers
            tensor_rank = 0 if "local_experts" in name else rank["tensor_rank"]
            np.testing.assert_array_equal(seen.setdefault((name, tensor_rank), value), value, err_msg=name)


def test_four_replicas_keep_a_fourth_of_the_state_each() -> None:
    """Of a model with few matrices: the largest share is what dealing whole matrices costs."""
    held = [rank["state_bytes"] for rank in _run(Layout(4))]
    whole = sum(held)
    assert whole == sum(rank["state_bytes"] for rank in _run(Layout(2)))
    assert max(held) < 1.2 * whole / 4


def _two_embeddings(rank: int, world_size: int) -> dict[bool, tuple[list[float], Any]]:
    """Norms of two steps, and the embedding of this stage, with and without the distributed optimizer."""
    from engram_megatron.model.parameter_names import global_named_parameters

    found = {}
    for distributed in (False, True):
        switch = f"parallel.distributed_optimizer={str(distributed).lower()}"
        run = build_small_run(_config("parallel.pipeline=2", "model.mtp.num_layers=1", switch), rank, world_size)
        norms = []
        for step in range(2):
            mine = microbatches(global_batch(step), run.ranks.data_rank, run.ranks.data_ranks)
            norms.append(run.trainer.train_step(step, mine, stop_requested=False).gradient_norm)
        found[distributed] = (
            norms,
            numbers(dict(global_named_parameters(run.chunks))["embedding.word_embeddings.weight"]),
        )
    return found


def test_both_stages_with_an_embedding_move_it_alike() -> None:
    """With multi-token prediction; their gradients are added after each replica has the sum of its shard alone."""
    ranks = run_ranks(_two_embeddings, 4)
    expected_norms, expected = ranks[0][False]
    for rank in ranks:
        norms, embedding = rank[True]
        assert norms == pytest.approx(expected_norms, rel=1e-13)
        np.testing.assert_array_equal(embedding, ranks[0][True][1])
        # Two replicas: the sums are the same; the clip coefficient differs by the rounding of the norm's.
        np.testing.assert_allclose(embedding, expected, rtol=0, atol=1e-12)


LAST = "checkpoints/step_00000004"


@pytest.fixture(scope="module")
def runs(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    """Four steps at once with the replicated optimizer in `straight`; two and then two more in `on`, which switches to
    the distributed one, in `off`, which switches back, and in `same`, which keeps it."""
    folder = tmp_path_factory.mktemp("runs")

    def start(name: str, distributed: str, **kwargs: Any) -> Start:
        overrides = ("training.num_steps=4", "checkpoint.every_steps=0", "training.dtype=bfloat16")
        switch = f"parallel.distributed_optimizer={distributed}"
        return Start(tiny_config(tiny_corpus, folder / name, *overrides, switch), **kwargs)

    starts = [
        start("straight", "false"),
        start("on", "false", stop_after=2),
        start("on", "true", resume=True),
        start("off", "true", stop_after=2),
        start("off", "false", resume=True),
        start("same", "true", stop_after=2),
        start("same", "true", resume=True),
    ]
    return folder, run_starts(starts)[0]


@pytest.mark.parametrize("name", ["on", "off", "same"])
def test_resume_may_switch_it_and_goes_on_bit_for_bit(runs: tuple[Path, list[Any]], name: str) -> None:
    """Two replicas: their sum does not depend on the order. The norm is summed in another order, in float64, and does
    not reach the bits of a bfloat16 run's float32 state here."""
    folder, summaries = runs
    assert [summary.step for summary in summaries] == [4, 2, 4, 2, 4, 2, 4]
    assert train_losses(folder / name) == train_losses(folder / "straight")
    expected, found = (backbone(folder / run / LAST) for run in ("straight", name))
    assert found.keys() == expected.keys()
    assert [key for key in expected if not torch.equal(expected[key], found[key])] == []
    rows, resumed_rows = (tables(folder / run / LAST) for run in ("straight", name))
    np.testing.assert_array_equal(resumed_rows["weight"], rows["weight"])
