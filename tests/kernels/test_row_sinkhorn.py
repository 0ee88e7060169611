"""Balanced momentum on the rows of two shards against the algorithm on the whole table."""

from typing import Any

import numba
import numpy as np
import pytest
from numpy.typing import NDArray

from engram_kernels.row_reference import MomentumRows, sinkhorn_step
from engram_kernels.row_sinkhorn import MomentumStep
from engram_kernels.row_state import SPLIT, RowState, compute_dtype, zero_rows

ROWS, DIM, USED, SPLIT_AT = 9000, 6, 300, 5000  # rows of more than one task in each shard
BETA, STEPS, THRESHOLD, RMS, LR, SCALE = 0.95, 11, 1e-3, 0.18, 1e-2, 0.25


def _gradients(step: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Of one half of the table until step 20, of the other one then: momentum fades below the threshold."""
    rng = np.random.default_rng(step)
    rows = rng.choice(ROWS // 3, USED, replace=False) + (ROWS // 2 if step >= 20 else 0)
    return np.sort(rows), rng.standard_normal((USED, DIM)).astype(np.float32) * rng.lognormal(0, 2, (USED, 1))


def _table(dtype: Any) -> RowState:
    table = zero_rows(ROWS, DIM, dtype, moments=1)
    values = np.random.default_rng(0).standard_normal((ROWS, DIM)).astype(np.float32)
    table.set_master(slice(0, ROWS), values.astype(compute_dtype(dtype)))
    return table


def _step(table: RowState, step: int) -> int:
    """As two shards that hold a part of the rows each; returns how many rows with momentum stood still."""
    rows, gradients = _gradients(step)
    parts = []
    for start, stop in ((0, SPLIT_AT), (SPLIT_AT, ROWS)):
        mine = (rows >= start) & (rows < stop)
        given = gradients[mine].astype(table.state.dtype)
        parts.append(MomentumStep(table, start, stop, rows[mine], given, SCALE, step + 1, BETA))
    for part in parts:
        part.blend()
    threshold = THRESHOLD * sum(part.norm_sum() for part in parts) / ROWS
    columns = np.ones(DIM)
    for _ in range(STEPS // 2):
        columns /= np.sqrt(np.sum([part.column_squares(columns, threshold) for part in parts], axis=0))
    before = table.master()
    for part in parts:
        part.move(columns, threshold, LR * RMS * np.sqrt(DIM))
    return int(((table.master() == before).all(axis=1) & (table.last_step > 0)).sum())


def _reference(num_steps: int, weight: NDArray[np.float64]) -> MomentumRows:
    reference = MomentumRows.start(weight)
    for step in range(num_steps):
        rows, gradients = _gradients(step)
        settings = {"beta": BETA, "num_steps": STEPS, "threshold": THRESHOLD, "update_rms": RMS}
        sinkhorn_step(reference, rows, gradients, LR, SCALE, **settings)
    return reference


def test_float64_equals_the_algorithm_on_the_whole_table() -> None:
    table = _table("float64")
    reference = _reference(200, table.weight)
    stood_still = [_step(table, step) for step in range(200)]
    assert stood_still[0] == 0
    assert stood_still[-1] > USED, "no row fell below the threshold"
    # a few hundred steps of ten roundings each, of updates of at most lr * rms * sqrt(D)
    np.testing.assert_allclose(table.weight, reference.weight, rtol=0, atol=1e-12)
    decay = BETA ** (200 - table.last_step[:, None])
    np.testing.assert_allclose(table.exp_avg * decay, reference.momentum, rtol=1e-12, atol=1e-30)


def test_float32_stays_within_its_rounding() -> None:
    table = _table("float32")
    reference = _reference(60, table.weight.astype(np.float64))
    for step in range(60):
        _step(table, step)
    # u: half an ulp of 1. A momentum carries up to 3 u for each of about 1 / (1 - beta) = 20 steps, and so does the
    # direction of its row, whose length is lr * rms * sqrt(D); writing a weight adds u |w|.
    u = float(np.finfo(np.float32).eps) / 2
    bound = 60 * (60 * u * LR * RMS * np.sqrt(DIM) + u * float(np.abs(reference.weight).max()))
    np.testing.assert_allclose(table.weight, reference.weight, rtol=0, atol=bound)


def test_bfloat16_with_remainder_is_the_float32_table_to_the_bit() -> None:
    split, whole = _table(SPLIT.name), _table("float32")
    for step in range(30):
        _step(split, step)
        _step(whole, step)
    np.testing.assert_array_equal(split.master(), whole.weight)
    np.testing.assert_array_equal(split.exp_avg, whole.exp_avg)
    np.testing.assert_array_equal(split.last_step, whole.last_step)


def test_result_is_the_same_for_any_number_of_threads() -> None:
    threads, tables = numba.get_num_threads(), []
    for number in (1, threads):
        numba.set_num_threads(number)
        table = _table("float32")
        for step in range(5):
            _step(table, step)
        tables.append(table)
    np.testing.assert_array_equal(tables[0].weight, tables[1].weight)


def test_every_row_moves_by_the_same_length() -> None:
    table = _table("float64")
    before = table.master()
    _step(table, 0)
    moved = np.linalg.norm(table.weight - before, axis=1)
    rows, _ = _gradients(0)
    np.testing.assert_allclose(moved[rows], LR * RMS * np.sqrt(DIM), rtol=1e-12)
    assert not np.delete(moved, rows).any()


def test_gradients_of_zero_move_nothing() -> None:
    table = _table("float32")
    before = table.master()
    step = MomentumStep(table, 0, ROWS, np.array([3]), np.zeros((1, DIM), np.float32), 1.0, 1, BETA)
    step.blend()
    assert step.norm_sum() == 0.0
    assert not step.column_squares(np.ones(DIM), 0.0).any()
    step.move(np.zeros(DIM), 0.0, 1.0)
    np.testing.assert_array_equal(table.master(), before)


def test_row_outside_the_table_is_an_error() -> None:
    with pytest.raises(IndexError, match=str(ROWS)):
        MomentumStep(_table("float32"), 0, ROWS, np.array([ROWS]), np.zeros((1, DIM), np.float32), 1.0, 1, BETA)
