"""Fifty steps of the sharded tables, and of one dense embedding under torch's Adam, as tests compare them.

With 300 steps without any gradient in the middle. Some ranks ask for nothing in some steps, some steps ask for nothing
at all, hot rows are asked for by all ranks, and half of the rows is left alone for several steps before it comes back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from sharded_tables import Tables, sharded_tables

from engram_megatron.gather.lookup import RowLookup
from engram_megatron.optimizer.row_adam import RowAdam
from engram_megatron.tables.row_gradients import RowGradients
from engram_megatron.tables.row_init import fill_initial_rows

ROWS, DIM, BLOCK_ROWS = 230, 6, 16  # the last block is short
STEPS, MICROBATCHES, IDS = 50, 3, (4, 5)  # ids of a microbatch: [4, 5]
IDLE_AFTER, IDLE_STEPS = 25, 300
LR, BETAS, EPS, GRADIENT_SCALE = 0.02, (0.9, 0.95), 1e-20, 0.25
TARGET = 10.0

Step = dict[str, Any]


def row_ids(step: int, rank: int) -> np.ndarray[Any, Any]:
    """[microbatches, 4, 5], zipf-like over one half of the rows, which changes every four steps."""
    empty = step % 10 == 6 or (step + rank) % 3 == 2
    rng = np.random.default_rng(100 * step + rank)
    ranked = np.minimum(rng.zipf(1.5, (0 if empty else MICROBATCHES, *IDS)), ROWS // 2) - 1
    return (ranked * 37 % (ROWS // 2)) * 2 + step // 4 % 2


def case_tables(dtype: str, ranks_per_node: int = 1, waves: int = 2, transport: str = "gloo") -> Tables:
    return Tables(
        rows=ROWS,
        row_dim=DIM,
        block_rows=BLOCK_ROWS,
        dtype=dtype,
        ranks_per_node=ranks_per_node,
        num_waves=waves,
        transport=transport,
    )


def sharded_history(rank: int, world_size: int, tables: Tables) -> list[Step]:
    """On a rank: what it read, its own rows' gradients and its own rows, step by step."""
    return history_of(*sharded_tables(tables, rank, world_size), rank)


def history_of(lookup: RowLookup, adam: RowAdam, rank: int) -> list[Step]:
    """`sharded_history` with tables that the caller has made."""
    shard, layout = lookup.shard, lookup.layout
    history = []
    for step in range(STEPS):
        ids = row_ids(step, rank)
        rows = lookup.read(ids)
        memory = []
        for microbatch in range(ids.shape[0]):
            expanded = rows.expand(microbatch)
            _loss(expanded).backward()
            memory.append(_numbers(expanded))
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


def _numbers(memory: torch.Tensor) -> np.ndarray[Any, Any]:
    memory = memory.detach()
    numbers: np.ndarray[Any, Any] = (memory.float() if memory.dtype == torch.bfloat16 else memory).numpy()
    return numbers


def _loss(memory: torch.Tensor) -> torch.Tensor:
    """Quadratic around a point that no row reaches: no gradient changes its sign, so none is small by cancellation."""
    weights = torch.linspace(0.5, 1.5, memory.numel(), dtype=memory.dtype).reshape(memory.shape)
    return 0.5 * (weights * (memory - TARGET) ** 2).sum()


def dense_history(world_size: int, dtype: str) -> list[Step]:
    """The same with one weight in one process: all ranks' batches, every row."""
    start = np.empty((ROWS, DIM), dtype)
    fill_initial_rows(start, 0, seed=5, std=1.0)
    embedding = torch.nn.Embedding(ROWS, DIM, _weight=torch.from_numpy(start))
    optimizer = torch.optim.Adam(embedding.parameters(), lr=LR, betas=BETAS, eps=EPS)
    history = []
    for step in range(STEPS):
        embedding.weight.grad = torch.zeros_like(embedding.weight)
        memory = []
        for rank in range(world_size):
            for microbatch in row_ids(step, rank):
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


def bounds(dtype: str) -> tuple[float, float]:
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


def check_equal(ranks: Sequence[Sequence[Step]], dtype: str) -> None:
    """Rows as read, gradients, weights and norm of the ranks' histories equal the dense ones in every step."""
    (row_bound, gradient_bound), expected = bounds(dtype), dense_history(len(ranks), dtype)
    for step in range(STEPS):
        of_ranks = [history[step] for history in ranks]
        memory = [m for one in of_ranks for m in one["memory"]]
        assert len(memory) == len(expected[step]["memory"]), f"microbatches of step {step}"
        for ours, theirs in zip(memory, expected[step]["memory"], strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=row_bound, err_msg=f"rows read in step {step}")

        gradient = np.zeros((ROWS, DIM), dtype)
        weight = np.full((ROWS, DIM), np.nan, dtype)
        for one in of_ranks:
            assert (np.diff(one["gradient_rows"]) > 0).all(), f"a row has two gradients in step {step}"
            gradient[one["gradient_rows"]] = one["gradients"]
            weight[one["rows"]] = one["weight"]
        told, reference = f"gradients of step {step}", expected[step]["gradient"]
        np.testing.assert_allclose(gradient, reference, rtol=gradient_bound, atol=0, err_msg=told)
        told, reference = f"weights after step {step}", expected[step]["weight"]
        np.testing.assert_allclose(weight, reference, rtol=0, atol=row_bound, err_msg=told)

        norm_squared = sum(one["norm_squared"] for one in of_ranks)
        dense_norm = float((expected[step]["gradient"].astype(np.float64) ** 2).sum())
        assert norm_squared == pytest.approx(dense_norm, rel=2 * gradient_bound), f"norm of step {step}"
