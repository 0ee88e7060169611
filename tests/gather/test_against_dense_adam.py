"""The sharded tables as a whole (gather, expand, gradients home, row Adam) against one dense embedding in one process.

Ten steps on 1, 2 and 4 ranks. Some ranks ask for nothing in some steps, one step asks for nothing at all, hot rows
are asked for by all ranks, and half of the rows is left alone for several steps before it comes back.
"""

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from ranks import run_ranks

from engram_megatron.gather.lookup import RowLookup
from engram_megatron.gather.transport import all_ranks_transport
from engram_megatron.optimizer.row_adam import RowAdam
from engram_megatron.tables.row_layout import RowLayout
from engram_megatron.tables.table_shard import TableShard

ROWS, DIM, BLOCK_ROWS = 230, 6, 16  # the last block is short
STEPS, MICROBATCHES, IDS = 10, 3, (4, 5)  # ids of a microbatch: [4, 5]
LR, BETAS, EPS, GRADIENT_SCALE = 0.02, (0.9, 0.95), 1e-20, 0.25
TARGET = 10.0


def _ids(step: int, rank: int) -> np.ndarray:
    """[microbatches, 4, 5], zipf-like over one half of the rows, which changes every four steps."""
    empty = step == 6 or (step + rank) % 3 == 2
    rng = np.random.default_rng(100 * step + rank)
    ranked = np.minimum(rng.zipf(1.5, (0 if empty else MICROBATCHES, *IDS)), ROWS // 2) - 1
    return (ranked * 37 % (ROWS // 2)) * 2 + step // 4 % 2


def _loss(memory: torch.Tensor) -> torch.Tensor:
    """Quadratic around a point that no row reaches: no gradient changes its sign, so none is small by cancellation."""
    weights = torch.linspace(0.5, 1.5, memory.numel(), dtype=memory.dtype).reshape(memory.shape)
    return 0.5 * (weights * (memory - TARGET) ** 2).sum()


def _both_dtypes(rank: int, world_size: int) -> dict[str, list[dict[str, Any]]]:
    return {dtype: _sharded(rank, world_size, dtype) for dtype in ("float32", "float64")}


def _sharded(rank: int, world_size: int, dtype: str) -> list[dict[str, Any]]:
    layout = RowLayout(ROWS, BLOCK_ROWS, world_size)
    shard = TableShard(layout, rank, DIM, dtype)
    shard.initialize(seed=5, std=1.0)
    lookup = RowLookup(shard, layout, all_ranks_transport(timeout_s=60))
    optimizer = RowAdam(shard, beta1=BETAS[0], beta2=BETAS[1], eps=EPS)
    history = []
    for step in range(STEPS):
        ids = _ids(step, rank)
        rows = lookup.start(ids).wait()
        memory = []
        for microbatch in range(ids.shape[0]):
            expanded = rows.expand(microbatch)
            _loss(expanded).backward()
            memory.append(expanded.detach().numpy())
        gradients = lookup.return_gradients(rows)
        norm_squared = optimizer.gradient_norm_squared(gradients)
        optimizer.step(gradients, LR, GRADIENT_SCALE)
        history.append(
            {
                "memory": memory,
                "gradient_rows": layout.global_row(rank, gradients.local_rows),
                "gradients": gradients.gradients,
                "norm_squared": norm_squared,
                "rows": layout.global_row(rank, np.arange(shard.num_rows)),
                "weight": shard.weight.copy(),
                "scalars": rows.statistics.scalars(),
            }
        )
    return history


def _dense(world_size: int, dtype: str) -> list[dict[str, Any]]:
    start = TableShard(RowLayout(ROWS, BLOCK_ROWS, 1), 0, DIM, dtype)
    start.initialize(seed=5, std=1.0)
    embedding = torch.nn.Embedding(ROWS, DIM, _weight=torch.from_numpy(start.weight.copy()))
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
        history.append({"memory": memory, "gradient": gradient, "weight": embedding.weight.detach().numpy().copy()})
    return history


@cache
def _run(world_size: int) -> list[dict[str, list[dict[str, Any]]]]:
    return run_ranks(_both_dtypes, world_size)


def _bounds(dtype: str) -> tuple[float, float]:
    """How far rows may be apart after all steps, and gradients relative to themselves; u = half an ulp of 1.

    A row occurs at most 240 times in a step (4 ranks x 60 ids), all its gradients have one sign, so their sum has a
    relative rounding error below 240 u, and an error d in the row changes it by at most d / 5 (|w - target| > 5).
    Adam adds 90 u to an update of at most 2 lr, and u |w| < 5 u to the weight (see tests/optimizer/test_row_adam.py).
    Per step and implementation: 2 lr (330 u + d / 5) + 5 u = 18.2 u + 0.008 d. Two implementations, ten steps, with
    1.008^10 < 1.1: 401 u, 2.4e-5 in float32 and 4.5e-14 in float64. Gradients: 2 x 240 u + 401 u / 5 < 600 u.
    """
    u = float(np.finfo(dtype).eps) / 2
    return 401 * u, 600 * u


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_rows_gradients_and_weights_equal_a_dense_embedding_in_every_step(world_size: int, dtype: str) -> None:
    row_bound, gradient_bound = _bounds(dtype)
    ranks, expected = _run(world_size), _dense(world_size, dtype)
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
    assert (first & last) - middle, "rows that are left alone and come back"


def test_two_runs_are_bit_identical() -> None:
    for first, second in zip(_run(4), run_ranks(_sharded, 4, "float32"), strict=True):
        for a, b in zip(first["float32"], second, strict=True):
            np.testing.assert_array_equal(a["weight"], b["weight"])
            np.testing.assert_array_equal(a["gradients"], b["gradients"])
            assert a["norm_squared"] == b["norm_squared"]


def test_a_row_crosses_the_wire_once_however_often_it_is_asked_for() -> None:
    layout = RowLayout(ROWS, BLOCK_ROWS, 4)
    for step in range(STEPS):
        distinct = [np.unique(_ids(step, rank)) for rank in range(4)]
        for rank in range(4):
            scalars = _run(4)[rank]["float32"][step]["scalars"]
            foreign = int((layout.owner(distinct[rank]) != rank).sum())
            served = sum(int((layout.owner(distinct[r]) == rank).sum()) for r in range(4) if r != rank)
            assert scalars["gather/lookups"] == _ids(step, rank).size
            assert scalars["gather/unique_rows"] == distinct[rank].size
            assert scalars["gather/id_bytes_sent"] == foreign * 8
            assert scalars["gather/row_bytes_received"] == scalars["gather/gradient_bytes_sent"] == foreign * DIM * 4
            assert scalars["gather/id_bytes_received"] == served * 8
            assert scalars["gather/row_bytes_sent"] == scalars["gather/gradient_bytes_received"] == served * DIM * 4
