"""Parameters, gradients, optimizer state and tables that ranks allocate, against what the plan says."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from ranks import run_ranks
from small_run import build_small_run, small_run_config

from engram_megatron.config import RunConfig
from engram_megatron.training.plan_layout import planned_memory

TOLERANCE = 0.05

# (ranks, overrides). Many rows, so that the last blocks of the tables do not decide.
ROWS = ("engram.rows_per_head=2003", "tables.block_rows=16")
LAYOUTS = [
    (2, ("parallel.expert=2",)),
    (2, ("parallel.tensor=2", "training.dtype=bfloat16", "model.mhc.mapping_dtype=float32")),
    (2, ("parallel.pipeline=2", "training.dtype=float32", "tables.dtype=float32")),
    (4, ("parallel.tensor=2", "parallel.expert=2")),
    (2, ("parallel.expert=2", "parallel.distributed_optimizer=true")),
    (2, ("parallel.distributed_optimizer=true", "training.dtype=bfloat16", "model.mhc.mapping_dtype=float32")),
    (2, ("parallel.pipeline=2", "model.mtp.num_layers=1")),
]


def _config(overrides: tuple[str, ...]) -> RunConfig:
    return small_run_config("float64", [*ROWS, *overrides])


def _measure(rank: int, world_size: int, layouts: list[tuple[str, ...]]) -> list[dict[str, int]]:
    results = []
    for overrides in layouts:
        run = build_small_run(_config(overrides), rank, world_size)
        results.append({"pipeline_rank": run.ranks.pipeline_rank, **_allocated(run)})
    return results


def _allocated(run: Any) -> dict[str, int]:
    """Bytes of this rank by kind. What two tensors share counts once."""
    import torch

    parameters = [parameter for chunk in run.chunks for parameter in chunk.parameters()]
    buffers = [b for chunk in run.chunks for b in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    kept = [tensor for state in run.optimizer.state_dict()["state"].values() for tensor in state.items()]
    rows = run.memory.shard.rows

    def size(tensors: list[Any]) -> int:
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        return sum(storages.values())

    assert all(isinstance(tensor, torch.Tensor) for _, tensor in kept)
    return {
        "weights": size(parameters),
        "gradients": size([buffer.grad_data for buffer in buffers]),
        "master_weights": size([tensor for name, tensor in kept if name == "master"]),
        "optimizer_state": size([tensor for name, tensor in kept if name != "master"]),
        "host_tables": rows.weight.nbytes + rows.state.nbytes + rows.last_step.nbytes,
    }


@cache
def _all_measured(ranks: int) -> dict[tuple[str, ...], list[dict[str, int]]]:
    layouts = [overrides for number, overrides in LAYOUTS if number == ranks]
    of_ranks = run_ranks(_measure, ranks, layouts, timeout_s=200.0)
    return {overrides: [results[i] for results in of_ranks] for i, overrides in enumerate(layouts)}


@pytest.mark.parametrize(("ranks", "overrides"), LAYOUTS, ids=lambda value: str(value))
def test_every_kind_of_memory_is_as_large_as_planned(ranks: int, overrides: tuple[str, ...]) -> None:
    for rank, measured in enumerate(_all_measured(ranks)[overrides]):
        planned = planned_memory(_config(overrides), ranks)[measured["pipeline_rank"]]
        for kind in ("weights", "gradients", "master_weights", "optimizer_state", "host_tables"):
            assert getattr(planned, kind) == pytest.approx(measured[kind], rel=TOLERANCE), (rank, kind)
        assert (measured["master_weights"] > 0) == ("training.dtype=bfloat16" in overrides)
