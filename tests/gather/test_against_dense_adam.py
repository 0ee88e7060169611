"""The sharded tables as a whole (gather, expand, gradients home, row Adam) against one dense embedding in one process.

On 1, 2 and 4 ranks, and between two nodes over the networks that a run may have. What a case does: `dense_adam_case`.
"""

from functools import cache

import numpy as np
import pytest
import torch
from dense_adam_case import (
    BETAS,
    BLOCK_ROWS,
    DIM,
    EPS,
    GRADIENT_SCALE,
    IDLE_AFTER,
    IDLE_STEPS,
    LR,
    ROWS,
    STEPS,
    Step,
    case_tables,
    check_equal,
    row_ids,
    sharded_history,
)
from mpi_ranks import run_mpi_ranks
from namespaces import run_namespace_ranks
from ranks import run_ranks

from engram_megatron.tables.row_init import fill_initial_rows
from engram_megatron.tables.row_layout import RowLayout


def _both_dtypes(rank: int, world_size: int, ranks_per_node: int) -> dict[str, list[Step]]:
    return {
        dtype: sharded_history(rank, world_size, case_tables(dtype, ranks_per_node)) for dtype in ("float32", "float64")
    }


# Ranks, and how many of them share a node: alone, all apart, all together, two by two.
JOBS = [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4)]


@cache
def _run(world_size: int, ranks_per_node: int) -> list[dict[str, list[Step]]]:
    return run_ranks(_both_dtypes, world_size, ranks_per_node)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("world_size", "ranks_per_node"), JOBS)
def test_rows_gradients_and_weights_equal_a_dense_embedding_in_every_step(
    world_size: int, ranks_per_node: int, dtype: str
) -> None:
    check_equal([history[dtype] for history in _run(world_size, ranks_per_node)], dtype)


def test_two_nodes_over_mpi_equal_a_dense_embedding_in_every_step() -> None:
    check_equal(run_mpi_ranks("mpi_cases", "train_tables", 2), "float64")


def test_two_hosts_over_tcp_equal_a_dense_embedding_and_count_what_crosses_between_them() -> None:
    of_ranks = run_namespace_ranks("namespace_cases", "train_tables")
    check_equal([history for history, _ in of_ranks], "float64")
    for rank, (_, sent) in enumerate(of_ranks):
        assert sent.counted > 4e6, f"rank {rank}"
        # the wire has headers of packets too, acknowledgements, counts and checksums
        assert sent.counted <= sent.crossed <= 1.05 * sent.counted, f"rank {rank}: {sent}"


def test_cases_that_the_comparison_promises_do_occur() -> None:
    ids = {(step, rank): set(row_ids(step, rank).reshape(-1).tolist()) for step in range(STEPS) for rank in range(4)}
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
    ranks = run_ranks(sharded_history, 2, case_tables("bfloat16"))
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
            for ids, memory in zip(row_ids(step, rank), one["memory"], strict=True):
                np.testing.assert_allclose(memory, parameter.detach().numpy()[ids], rtol=2**-8, atol=1e-5)
        parameter.grad = torch.from_numpy(gradient) * GRADIENT_SCALE
        optimizer.step()
        if step == IDLE_AFTER:
            parameter.grad.zero_()
            for _ in range(IDLE_STEPS):
                optimizer.step()
        # Adam's own rounding (see `dense_adam_case.bounds`): in every step 90 u of an update of at most 2 lr, and u of
        # a weight below 5
        bound = (2 * STEPS * (90 * 2 * LR + 5) + IDLE_STEPS * 5) * u
        np.testing.assert_allclose(masters, parameter.detach().numpy(), rtol=0, atol=bound)


@pytest.mark.parametrize(
    "ranks_per_node", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(4, marks=pytest.mark.slow)]
)
def test_two_runs_are_bit_identical_and_waves_change_nothing(ranks_per_node: int) -> None:
    for waves in (2, 1):
        again = run_ranks(sharded_history, 4, case_tables("float32", ranks_per_node, waves))
        for first, second in zip(_run(4, ranks_per_node), again, strict=True):
            for a, b in zip(first["float32"], second, strict=True):
                np.testing.assert_array_equal(a["weight"], b["weight"])
                np.testing.assert_array_equal(a["gradients"], b["gradients"])
                assert a["norm_squared"] == b["norm_squared"]


@pytest.mark.parametrize("ranks_per_node", [1, 2, 4])
def test_a_row_crosses_the_network_once_per_node_however_often_it_is_asked_for(ranks_per_node: int) -> None:
    layout = RowLayout(ROWS, BLOCK_ROWS, 4, 4 // ranks_per_node)
    for step in range(STEPS):
        of_rank = [np.unique(row_ids(step, rank)) for rank in range(4)]
        nodes = [of_rank[first : first + ranks_per_node] for first in range(0, 4, ranks_per_node)]
        of_node = [np.unique(np.concatenate(ranks)) for ranks in nodes]
        for rank in range(4):
            node, rail = divmod(rank, ranks_per_node)
            scalars = _run(4, ranks_per_node)[rank]["float32"][step]["scalars"]
            owners = layout.owner(of_node[node])
            foreign = int(((owners // ranks_per_node != node) & (owners % ranks_per_node == rail)).sum())
            served = sum(int((layout.owner(rows) == rank).sum()) for n, rows in enumerate(of_node) if n != node)
            own = int((layout.owner(of_rank[rank]) // ranks_per_node == node).sum())
            assert scalars["gather/lookups"] == row_ids(step, rank).size
            assert scalars["gather/unique_rows"] == of_rank[rank].size
            assert scalars["gather/id_bytes_sent"] == foreign * 8
            assert scalars["gather/row_bytes_received"] == scalars["gather/gradient_bytes_sent"] == foreign * DIM * 4
            assert scalars["gather/id_bytes_received"] == served * 8
            assert scalars["gather/row_bytes_sent"] == scalars["gather/gradient_bytes_received"] == served * DIM * 4
            assert scalars["gather/node_row_bytes"] == own * DIM * 4
