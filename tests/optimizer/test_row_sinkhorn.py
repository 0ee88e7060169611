"""Balanced momentum over sharded tables against the algorithm on each whole table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import run_ranks
from saved_tables import save_tables
from sharded_tables import Tables, balanced_tables, sharded_tables

from engram_checkpoints.tables import load_shard
from engram_kernels.row_reference import MomentumRows, sinkhorn_step
from engram_megatron.config_optimizer import OptimizerConfig
from engram_megatron.config_tables import TablesConfig
from engram_megatron.errors import UsageError
from engram_megatron.optimizer.row_adam import CatchUp, RowAdam
from engram_megatron.tables.row_init import fill_initial_rows

ROWS, SECOND, DIM, STEPS, LR = 700, 300, 6, 60, 1e-2
TABLES = Tables(rows=ROWS, row_dim=DIM, dtype="float64")


def _ids(rank: int, step: int) -> np.ndarray:
    """Of both tables; those below 100 only in the first steps."""
    lowest = 0 if step < 5 else 100
    return np.random.default_rng([rank, step]).integers(lowest, 650, (2, 40))


def _weights(ids: np.ndarray) -> torch.Tensor:
    """Of a loss that is linear in the rows: its gradient."""
    return torch.from_numpy(np.sin(np.arange(ids.size * DIM)).reshape(*ids.shape, DIM) * np.exp(ids[..., None] % 7))


def _train(rank: int, world_size: int, ranks_per_node: int, steps: int = STEPS) -> tuple[Any, ...]:
    tables = Tables(rows=ROWS, row_dim=DIM, dtype="float64", ranks_per_node=ranks_per_node)
    lookup, optimizer = balanced_tables(tables, (0, SECOND), rank, world_size)
    for step in range(steps):
        ids = _ids(rank, step)
        rows = lookup.read(ids)
        (rows.expand() * _weights(ids)).sum().backward()
        optimizer.step(lookup.return_gradients(rows), LR, 0.5)
    shard = optimizer.shard
    everything = np.arange(shard.num_rows)
    return shard.layout.global_row(rank, everything), shard.exact(everything), optimizer.last_update


def _reference(world_size: int) -> np.ndarray:
    weight = np.empty((ROWS, DIM))
    fill_initial_rows(weight, 0, TABLES.seed, 1.0)
    parts = [MomentumRows.start(weight[:SECOND]), MomentumRows.start(weight[SECOND:])]
    config = OptimizerConfig()
    for step in range(STEPS):
        gradient = np.zeros((ROWS, DIM))
        for rank in range(world_size):
            ids = _ids(rank, step)
            np.add.at(gradient, ids, _weights(ids).numpy())
        for part, of_part in zip(parts, np.split(gradient, [SECOND]), strict=True):
            sinkhorn_step(
                part,
                np.arange(len(of_part)),
                of_part,
                LR,
                0.5,
                beta=config.sinkhorn_momentum,
                num_steps=config.sinkhorn_steps,
                threshold=config.sinkhorn_row_threshold,
                update_rms=config.sinkhorn_update_rms,
            )
    return np.concatenate([part.weight for part in parts])


@pytest.mark.parametrize(("world_size", "ranks_per_node"), [(1, 1), (2, 2), (2, 1), (4, 2)])
def test_each_layers_table_is_balanced_over_all_ranks(world_size: int, ranks_per_node: int) -> None:
    parts = run_ranks(_train, world_size, ranks_per_node)
    found = np.full((ROWS, DIM), np.nan)
    for rows, values, update in parts:
        found[rows] = values.weight
        assert update.update_square > 0
    expected = _reference(world_size)
    assert (expected[660:] == found[660:]).all(), "rows that nobody used moved"
    # 60 steps of ten roundings of 1e-16 each, of updates of 4e-3
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


def test_two_runs_are_bit_identical() -> None:
    first, second = (run_ranks(_train, 2, 1) for _ in range(2))
    for (_, one, _), (_, other, _) in zip(first, second, strict=True):
        np.testing.assert_array_equal(one.weight, other.weight)
        np.testing.assert_array_equal(one.state, other.state)


def _step(optimizer: Any, lookup: Any, step: int) -> None:
    ids = _ids(0, step)
    rows = lookup.read(ids)
    (rows.expand() * _weights(ids)).sum().backward()
    optimizer.step(lookup.return_gradients(rows), LR)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_saved_and_loaded_it_goes_on_as_if_nothing_had_happened(dtype: str, tmp_path: Path) -> None:
    tables = Tables(rows=ROWS, row_dim=DIM, dtype=dtype)
    lookup, optimizer = balanced_tables(tables, (0, SECOND))
    for step in range(4):
        _step(optimizer, lookup, step)
    save_tables(tmp_path / "tables.zarr", optimizer)
    again_lookup, again = balanced_tables(tables, (0, SECOND))
    load_shard(tmp_path / "tables.zarr", again)
    assert again.step_count == 4
    for step in range(4, 8):
        _step(optimizer, lookup, step)
        _step(again, again_lookup, step)
    everything = np.arange(ROWS)
    one, other = optimizer.shard.exact(everything), again.shard.exact(everything)
    np.testing.assert_array_equal(one.weight, other.weight)
    np.testing.assert_array_equal(one.exp_avg, other.exp_avg)


def test_weights_may_go_to_another_optimizer_and_moments_may_not(tmp_path: Path) -> None:
    lookup, optimizer = balanced_tables(TABLES, (0, SECOND))
    _step(optimizer, lookup, 0)
    save_tables(tmp_path / "tables.zarr", optimizer)
    _, adam = sharded_tables(TABLES)
    with pytest.raises(UsageError, match=r"update = sinkhorn, this run's have dense; .*tables\.update that they were"):
        load_shard(tmp_path / "tables.zarr", adam)
    load_shard(tmp_path / "tables.zarr", adam, weights_only=True)
    np.testing.assert_array_equal(adam.shard.rows.weight, optimizer.shard.rows.weight)
    assert isinstance(adam, RowAdam)
    assert isinstance(adam.read_as_of, CatchUp)
    assert adam.step_count == 0
    save_tables(tmp_path / "adam.zarr", adam)
    load_shard(tmp_path / "adam.zarr", optimizer, weights_only=True)
    assert not optimizer.shard.rows.exp_avg.any()
    assert optimizer.step_count == 0


@pytest.mark.parametrize(("dtype", "of_parameter"), [("float32", 8), ("bfloat16", 8), ("float64", 16)])
def test_one_moment_takes_two_thirds_of_the_memory(dtype: Any, of_parameter: int) -> None:
    shard = balanced_tables(Tables(rows=100_000, row_dim=32, dtype=dtype), (0, 40_000))[1].shard
    expected = 100_000 * (32 * of_parameter + 4)
    assert TablesConfig(dtype=dtype, update="sinkhorn").memory_bytes(100_000, 32) == expected
    assert shard.rows.weight.nbytes + shard.rows.state.nbytes + shard.rows.last_step.nbytes == expected
