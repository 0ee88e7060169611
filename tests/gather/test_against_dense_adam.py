"""The sharded tables as a whole (gather, expand, gradients home, row Adam) against one dense embedding in one process.

Fifty steps on 1, 2 and 4 ranks, and 300 without any gradient in the middle. Some ranks ask for nothing in some steps,
some steps ask for nothing at all, hot rows are asked for by all ranks, and half of the rows is left alone for several
steps before it comes back.
"""

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from ranks import run_ranks
from sharded_tables import Tables, sharded_tables

from engram_megatron.tables.row_gradients import RowGradients
from engram_megatron.tables.row_init import fill_initial_rows
from engram_megatron.tables.row_layout import RowLayout

ROWS, DIM, BLOCK_ROWS = 230, 6, 16  # the last block is short
STEPS, MICROBATCHES, IDS = 50, 3, (4, 5)  # ids of a microbatch: [4, 5]
IDLE_AFTER, IDLE_STEPS = 25, 300
LR, BETAS, EPS, GRADIENT_SCALE = 0.02, (0.9, 0.95), 1e-20, 0.25
TARGET = 10.0


def _ids(step: int, rank: int) -> np.ndarray:
    """[microbatches, 4, 5], zipf-like over one half of the rows, which changes every four steps."""
    empty = step % 10 == 6 or (step + rank) % 3 == 2
    rng = np.random.default_rng(100 * step + rank)
    ranked = np.minimum(rng.zipf(1.5, (0 if empty else MICROBATCHES, *IDS)), ROWS // 2) - 1
    return (ranked * 37 % (ROWS // 2)) * 2 + step // 4 % 2


def _loss(memory: torch.Tensor) -> torch.Tensor:
    """Quadratic around a point that no row reaches: no gradient changes its sign, so none is small by cancellation."""
    weights = torch.linspace(0.5, 1.5, memory.numel(), dtype=memory.dtype).reshape(memory.shape)
    return 0.5 * (weights * (memory - TARGET) ** 2).sum()


def _both_dtypes(rank: int, world_size: int, ranks_per_node: int) -> dict[str, list[dict[str, Any]]]:
    return {dtype: _sharded(rank, world_size, ranks_per_node, dtype) for dtype in ("float32", "float64")}


def _sharded(rank: int, world_size: int, ranks_per_node: int, dtype: str, waves: int = 2) -> list[dict[str, Any]]:
    tables = Tables(
        rows=ROWS,
        row_dim=DIM,
        block_rows=BLOCK_ROWS,
        dtype=dtype,
        ranks_per_node=ranks_per_node,
        num_waves=waves,
    )
    lookup, adam = sharded_tables(tables, rank, world_size)
    shard, layout = lookup.shard, lookup.layout
    history = []
    for step in range(STEPS):
        ids = _ids(step, rank)
        rows = lookup.read(ids)
        memory = []
        for microbatch in range(ids.shape[0]):
            expanded = rows.expand(microbatch)
            _loss(expanded).backward()
            memory.append(expanded.detach().float().numpy() if dtype == "bfloat16" else expanded.detach().numpy())
        gradients = lookup.return_gradients(rows)
        norm_squared = gradients.norm_squared
        adam.step(gradients, LR, GRADIENT_SCALE)
        if step == IDLE_AFTER:
            nothing = RowGradients.summed(np.empty(0, np.int64), [np.empty((0, DIM), shard.wide)])
            for _ in range(IDLE_STEPS):
                adam.step(nothing, LR)
        history.append(
            {
                "memory": memory,
                "gradient_rows": layout.global_row(rank, gradients.local_rows),
                "gradients": gradients.gradients,
                "norm_squared": norm_squared,
                "rows": layout.global_row(rank, np.arange(shard.num_rows)),
                "weight": shard.finished(adam.read_as_of),
                "masters": shard.finished_masters(np.arange(shard.num_rows), adam.read_as_of),
                "scalars": rows.statistics.scalars(),
            }
        )
    return history


def _dense(world_size: int, dtype: str) -> list[dict[str, Any]]:
    start = np.empty((ROWS, DIM), dtype)
    fill_initial_rows(start, 0, seed=5, std=1.0)
    embedding = torch.nn.Embedding(ROWS, DIM, _weight=torch.from_numpy(start))
    optimizer = torch.optim.Adam(embedding.parameters(), lr=LR, betas=BETAS, eps=EPS)
    history = []
    for step in range(STEPS):
        embedding.weight.grad = torch.zeros_like(embedding.weight)
        memory = []
        for rank in range(world_size):
            for microbatch in _ids(step, rank):
                rows = embedding(torch.from_numpy(microbatch))
                _loss(rows).backward()
                memory.append(rows.detach().numpy())
        gradient = embedding.weight.grad.numpy().copy()
        embedding.weight.grad *= GRADIENT_SCALE
        optimizer.step()
        if step == IDLE_AFTER:
            embedding.weight.grad.zero_()
            for _ in range(IDLE_STEPS):
                optimizer.step()
        history.append({"memory": memory, "gradient": gradient, "weight": embedding.weight.detach().numpy().copy()})
    return history


# Ranks, and how many of them share a node: alone, all apart, all together, two by two.
JOBS = [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4)]


@cache
def _run(world_size: int, ranks_per_node: int) -> list[dict[str, list[dict[str, Any]]]]:
    return run_ranks(_both_dtypes, world_size, ranks_per_node)


def _bounds(dtype: str) -> tuple[float, float]:
    """How far rows may be apart after all steps, and gradients relative to themselves; u = half an ulp of 1.

    A row occurs at most 240 times in a step (4 ranks x 60 ids), all its gradients have one sign, so their sum has a
    relative rounding error below 240 u, and an error d in the row changes it by at most d / 5 (|w - target| > 5).
    Adam adds 90 u to an update of at most 2 lr, and u |w| < 5 u to the weight (see tests/optimizer/test_row_adam.py).
    Per step and implementation: 2 lr (330 u + d / 5) + 5 u = 18.2 u + 0.008 d. Fifty steps: 18.2 u (1.008^50 - 1) /
    0.008 < 1120 u. An idle step moves a row by less and less, but still rounds the weight of the dense implementation:
    300 x 5 u, enlarged by at most 1.008^24 < 1.22 afterwards: 1830 u. Two implementations, the idle steps in one:
    4100 u, 2.5e-4 in float32 and 4.6e-13 in float64. Gradients: 2 x 240 u + 4100 u / 5 = 1300 u.
    """
    u = float(np.finfo(dtype).eps) / 2
    return 4100 * u, 1300 * u


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("world_size", "ranks_per_node"), JOBS)
def test_rows_gradients_and_weights_equal_a_dense_embedding_in_every_step(
    world_size: int, ranks_per_node: int, dtype: str
) -> None:
    row_bound, gradient_bound = _bounds(dtype)
    ranks, expected = _run(world_size, ranks_per_node), _dense(world_size, dtype)
    for step in range(STEPS):
        of_ranks = [history[dtype][step] for history in ranks]
        memory = [m for one in of_ranks for m in one["memory"]]
        assert len(memory) == len(expected[step]["memory"])
        for ours, theirs in zip(memory, expected[step]["memory"], strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=row_bound)

        gradient = np.zeros((ROWS, DIM), dtype)
        weight = np.full((ROWS, DIM), np.nan, dtype)
        for one in of_ranks:
            assert (np.diff(one["gradient_rows"]) > 0).all()
            gradient[one["gradient_rows"]] = one["gradients"]
            weight[one["rows"]] = one["weight"]
        np.testing.assert_allclose(gradient, expected[step]["gradient"], rtol=gradient_bound, atol=0)
        np.testing.assert_allclose(weight, expected[step]["weight"], rtol=0, atol=row_bound)

        norm_squared = sum(one["norm_squared"] for one in of_ranks)
        reference = float((expected[step]["gradient"].astype(np.float64) ** 2).sum())
        assert norm_squared == pytest.approx(reference, rel=2 * gradient_bound)


def test_cases_that_the_comparison_promises_do_occur() -> None:
    ids = {(step, rank): set(_ids(step, rank).reshape(-1).tolist()) for step in range(STEPS) for rank in range(4)}
    assert all(not ids[6, rank] for rank in range(4)), "a step without requests"
    assert any(not ids[step, 0] and ids[step, 1] for step in range(STEPS)), "a rank that asks for nothing"
    assert ids[0, 0] & ids[0, 1], "a row that two ranks ask for"
    first, middle, last = (
        set().union(*(ids[s, r] for s in span for r in range(4))) for span in ((0, 1), (4, 5), (8, 9))
    )
    before, after = (set().union(*(ids[s, r] for s in span for r in range(4))) for span in (range(24), range(26, 30)))
    assert before & after, "rows that come back after the idle steps"
    assert (first & last) - middle, "rows that are left alone and come back"


def test_bfloat16_tables_train_exact_float32_weights() -> None:
    """The model reads bfloat16, the weights behind it are those that float32 Adam makes of the same gradients."""
    u = float(np.finfo(np.float32).eps) / 2
    ranks = run_ranks(_sharded, 2, 1, "bfloat16")
    weight = np.empty((ROWS, DIM), np.float32)
    fill_initial_rows(weight, 0, seed=5, std=1.0)
    parameter = torch.nn.Parameter(torch.from_numpy(weight))
    optimizer = torch.optim.Adam([parameter], lr=LR, betas=BETAS, eps=EPS)
    for step in range(STEPS):
        gradient, masters = np.zeros((ROWS, DIM), np.float32), np.empty((ROWS, DIM), np.float32)
        for rank, history in enumerate(ranks):
            one = history[step]
            gradient[one["gradient_rows"]] = one["gradients"]
            masters[one["rows"]] = one["masters"]
            for ids, memory in zip(_ids(step, rank), one["memory"], strict=True):
                np.testing.assert_allclose(memory, parameter.detach().numpy()[ids], rtol=2**-8, atol=1e-5)
        parameter.grad = torch.from_numpy(gradient) * GRADIENT_SCALE
        optimizer.step()
        if step == IDLE_AFTER:
            parameter.grad.zero_()
            for _ in range(IDLE_STEPS):
                optimizer.step()
        # Adam's own rounding (see `_bounds`): 90 u of an update of at most 2 lr and u of a weight below 5 in every step
        bound = (2 * STEPS * (90 * 2 * LR + 5) + IDLE_STEPS * 5) * u
        np.testing.assert_allclose(masters, parameter.detach().numpy(), rtol=0, atol=bound)


@pytest.mark.parametrize("ranks_per_node", [1, 2, 4])
def test_two_runs_are_bit_identical_and_waves_change_nothing(ranks_per_node: int) -> None:
    for waves in (2, 1):
        again = run_ranks(_sharded, 4, ranks_per_node, "float32", waves)
        for first, second in zip(_run(4, ranks_per_node), again, strict=True):
            for a, b in zip(first["float32"], second, strict=True):
                np.testing.assert_array_equal(a["weight"], b["weight"])
                np.testing.assert_array_equal(a["gradients"], b["gradients"])
                assert a["norm_squared"] == b["norm_squared"]


@pytest.mark.parametrize("ranks_per_node", [1, 2, 4])
def test_a_row_crosses_the_network_once_per_node_however_often_it_is_asked_for(ranks_per_node: int) -> None:
    layout = RowLayout(ROWS, BLOCK_ROWS, 4, 4 // ranks_per_node)
    for step in range(STEPS):
        of_rank = [np.unique(_ids(step, rank)) for rank in range(4)]
        nodes = [of_rank[first : first + ranks_per_node] for first in range(0, 4, ranks_per_node)]
        of_node = [np.unique(np.concatenate(ranks)) for ranks in nodes]
        for rank in range(4):
            node, rail = divmod(rank, ranks_per_node)
            scalars = _run(4, ranks_per_node)[rank]["float32"][step]["scalars"]
            owners = layout.owner(of_node[node])
            foreign = int(((owners // ranks_per_node != node) & (owners % ranks_per_node == rail)).sum())
            served = sum(int((layout.owner(rows) == rank).sum()) for n, rows in enumerate(of_node) if n != node)
            own = int((layout.owner(of_rank[rank]) // ranks_per_node == node).sum())
            assert scalars["gather/lookups"] == _ids(step, rank).size
            assert scalars["gather/unique_rows"] == of_rank[rank].size
            assert scalars["gather/id_bytes_sent"] == foreign * 8
            assert scalars["gather/row_bytes_received"] == scalars["gather/gradient_bytes_sent"] == foreign * DIM * 4
            assert scalars["gather/id_bytes_received"] == served * 8
            assert scalars["gather/row_bytes_sent"] == scalars["gather/gradient_bytes_received"] == served * DIM * 4
            assert scalars["gather/node_row_bytes"] == own * DIM * 4
