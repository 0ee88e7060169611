"""Row Adam against dense Adam on the whole table, and reads against what an update starts from.

Rows come from two windows that change every 10 steps, so that rows are new, repeated, left alone and never used; after
step 60 only the first window is used, and from step 360 on the second comes back.
"""

from typing import Any

import numba
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from engram_kernels.catch_up import CatchUp
from engram_kernels.gather_rows import gather_rows
from engram_kernels.row_adam import is_for_sweep, read_rows, sweep_rows, update_rows
from engram_kernels.row_reference import DenseRows, dense_adam_step, touched_adam_step
from engram_kernels.row_state import SPLIT, RowState, compute_dtype, zero_rows
from engram_kernels.split_float import bfloat16_to_float32, round_to_bfloat16

ROWS, DIM, USED = 900, 6, 40
BETAS, EPS, LR, SCALE = (0.9, 0.95), 1e-20, 1e-2, 0.25
LARGE_EPS = 1e-3  # next to gradients of 1
WEIGHT_DTYPES = ["float64", "float32", SPLIT.name]

Gradients = tuple[NDArray[np.int64], NDArray[Any]]
# Which steps move all rows, and not only those with a gradient.
SWEEPS = {"never": lambda step: False, "always": lambda step: True, "at times": lambda step: step % 7 < 2}


def _table(dtype: str, row_dim: int = DIM) -> RowState:
    table = zero_rows(ROWS, row_dim, dtype)
    values = np.random.default_rng(0).standard_normal((ROWS, row_dim)).astype(np.float32)
    table.set_master(slice(0, len(values)), values.astype(compute_dtype(dtype)))
    return table


def _gradients(step: int, row_dim: int = DIM) -> Gradients:
    """Float32 values in float64, so that tables of all dtypes take the same numbers."""
    rng = np.random.default_rng(step)
    second = step // 10 % 2 == 1 if step < 60 else step >= 360
    window = ROWS // 3 * second + rng.choice(ROWS // 2, USED, replace=False)
    return np.sort(window), rng.standard_normal((USED, row_dim)).astype(np.float32).astype(np.float64)


def _rate(step: int) -> float:
    """Warms up, decays in steps, and is zero for a while."""
    return LR * min(1.0, (step + 1) / 20) * (0.0 if 30 <= step < 33 else 1.0) * (1.0 if step < 45 else 0.3)


def _run(
    table: RowState,
    steps: range,
    catch_up: CatchUp | None = None,
    eps: float = EPS,
    touched_only: bool = False,
    sweeps: str = "never",
) -> CatchUp:
    catch_up = catch_up or CatchUp(*BETAS, eps)
    for step in steps:
        rows, gradients = _gradients(step, table.row_dim)
        gradients = gradients.astype(table.state.dtype)
        if SWEEPS[sweeps](step):
            sweep_rows(table, rows, gradients, catch_up, _rate(step), SCALE)
        else:
            update_rows(table, rows, gradients, catch_up, _rate(step), SCALE, touched_only=touched_only)
        catch_up.advance(_rate(step))
    return catch_up


def _read_all(table: RowState, catch_up: CatchUp) -> NDArray[Any]:
    out = np.empty_like(table.weight)
    read_rows(table, np.arange(ROWS), out, catch_up)
    return out


def _copy(table: RowState) -> RowState:
    return RowState(table.weight.copy(), table.state.copy(), table.last_step.copy())


def _assert_same(first: RowState, second: RowState) -> None:
    for ours, theirs in ((first.weight, second.weight), (first.state, second.state)):
        np.testing.assert_array_equal(ours.view(np.uint8), theirs.view(np.uint8))
    np.testing.assert_array_equal(first.last_step, second.last_step)


def _torch_adam(weight: NDArray[np.float64], steps: range, eps: float) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    parameter = torch.nn.Parameter(torch.from_numpy(weight.copy()))
    optimizer = torch.optim.Adam([parameter], lr=LR, betas=BETAS, eps=eps)
    for step in steps:
        rows, gradients = _gradients(step, weight.shape[1])
        parameter.grad = torch.zeros_like(parameter)
        parameter.grad[torch.from_numpy(rows)] = torch.from_numpy(gradients * SCALE)
        optimizer.param_groups[0]["lr"] = _rate(step)
        optimizer.step()
    return parameter.detach(), optimizer.state[parameter]


@pytest.mark.parametrize("eps", [EPS, LARGE_EPS])
@pytest.mark.parametrize("sweeps", SWEEPS)
def test_float64_equals_dense_adam_of_torch_with_rows_left_alone_for_300_steps(eps: float, sweeps: str) -> None:
    table = _table("float64")
    weight, state = _torch_adam(table.weight, range(400), eps)
    catch_up = _run(table, range(400), eps=eps, sweeps=sweeps)
    used = table.last_step > 0
    assert 0 < used.sum() < ROWS
    if sweeps == "never":
        assert (table.last_step[used] < 60).any(), "some row must be behind by more than 300 steps"
    # the closed form adds the same numbers in another order: a few hundred roundings of 1e-16
    np.testing.assert_allclose(_read_all(table, catch_up), weight.numpy(), rtol=1e-10, atol=1e-12)
    behind = 400 - table.last_step[:, None]
    for ours, theirs, beta in ((table.exp_avg, "exp_avg", BETAS[0]), (table.exp_avg_sq, "exp_avg_sq", BETAS[1])):
        np.testing.assert_allclose(ours * beta**behind, state[theirs].numpy(), rtol=1e-10, atol=1e-30)


def test_reference_is_adam_of_torch() -> None:
    weight = _table("float64").weight
    dense = DenseRows.start(weight)
    for step in range(50):
        dense_adam_step(dense, *_gradients(step), _rate(step), SCALE, BETAS, EPS)
    np.testing.assert_allclose(dense.weight, _torch_adam(weight, range(50), EPS)[0].numpy(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("row_dim", [DIM, 5, 1])
@pytest.mark.parametrize("eps", [EPS, LARGE_EPS])
@pytest.mark.parametrize("sweeps", SWEEPS)
def test_float32_stays_within_its_rounding(eps: float, row_dim: int, sweeps: str) -> None:
    table = _table("float32", row_dim)
    dense = DenseRows.start(table.master().astype(np.float64))
    for step in range(120):
        dense_adam_step(dense, *_gradients(step, row_dim), _rate(step), SCALE, BETAS, eps)
    catch_up = _run(table, range(120), eps=eps, sweeps=sweeps)
    # u: half an ulp of 1. A moment carries at most 40 u (m) or 80 u (v, halved by the root) of the sums of absolute
    # gradients it was made of, the update six more: under 90 u of at most 2 lr per step; each write to a weight adds
    # u |w|, one per step when stepped and at most two per step in the closed form.
    u = float(np.finfo(np.float32).eps) / 2
    bound = 120 * (2 * LR * 90 * u + 2 * float(np.abs(dense.weight).max()) * u)
    np.testing.assert_allclose(_read_all(table, catch_up), dense.weight, rtol=0, atol=bound)


@pytest.mark.parametrize("eps", [EPS, LARGE_EPS])
@pytest.mark.parametrize(("touched_only", "sweeps"), [(False, "never"), (True, "never"), (False, "at times")])
def test_bfloat16_with_remainder_is_the_float32_table_to_the_bit(eps: float, touched_only: bool, sweeps: str) -> None:
    split, whole = _table(SPLIT.name), _table("float32")
    catch_up = _run(split, range(120), eps=eps, touched_only=touched_only, sweeps=sweeps)
    _run(whole, range(120), eps=eps, touched_only=touched_only, sweeps=sweeps)
    np.testing.assert_array_equal(split.master(), whole.weight)
    np.testing.assert_array_equal(split.exp_avg, whole.exp_avg)
    np.testing.assert_array_equal(split.exp_avg_sq, whole.exp_avg_sq)
    np.testing.assert_array_equal(split.weight, round_to_bfloat16(whole.weight))
    np.testing.assert_array_equal(_read_all(split, catch_up), round_to_bfloat16(_read_all(whole, catch_up)))


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_touched_only_equals_its_reference(dtype: str) -> None:
    table = _table(dtype)
    reference = DenseRows.start(table.weight.astype(np.float64))
    for step in range(120):
        touched_adam_step(reference, *_gradients(step), _rate(step), SCALE, BETAS, EPS)
    _run(table, range(120), touched_only=True)
    u = float(np.finfo(dtype).eps) / 2
    bound = 120 * (2 * LR * 90 * u + float(np.abs(reference.weight).max()) * u)  # as for float32 above
    np.testing.assert_allclose(table.weight, reference.weight, rtol=0, atol=bound)


@pytest.mark.parametrize("eps", [EPS, LARGE_EPS])
@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
def test_reading_changes_nothing_and_shows_what_an_update_starts_from(dtype: str, eps: float) -> None:
    table = _table(dtype)
    catch_up = _run(table, range(40), eps=eps)
    before = _copy(table)
    first = _read_all(table, catch_up)
    _assert_same(table, before)
    np.testing.assert_array_equal(first, _read_all(table, catch_up))
    # an update with lr 0 catches up and then moves nothing
    update_rows(table, np.arange(ROWS), np.zeros((ROWS, DIM), table.state.dtype), catch_up, lr=0.0)
    np.testing.assert_array_equal(table.weight, first)


@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
@pytest.mark.parametrize("sweeps", ["never", "always"])
def test_rows_that_never_had_a_gradient_stay_bit_identical(dtype: str, sweeps: str) -> None:
    table = _table(dtype)
    before = table.weight.copy()
    catch_up = _run(table, range(60), sweeps=sweeps)
    never = table.last_step == 0
    assert never.any()
    np.testing.assert_array_equal(table.weight[never], before[never])
    np.testing.assert_array_equal(_read_all(table, catch_up)[never], before[never])


def test_moments_that_are_zero_give_no_nan_without_eps() -> None:
    table = _table("float32")
    before = table.weight.copy()
    catch_up = CatchUp(*BETAS, 0.0)
    gradients = np.zeros((2, DIM), np.float32)
    gradients[0, 0] = 1e-30  # its square is zero in float32
    for rows, update in (([3, 4], update_rows), ([5, 6], update_rows), ([3, 4], update_rows), ([3, 5], sweep_rows)):
        update(table, np.array(rows), gradients, catch_up, LR)
        catch_up.advance(LR)
    np.testing.assert_array_equal(_read_all(table, catch_up), before)


def test_moments_left_alone_for_thousands_of_steps_become_zero() -> None:
    table = _table("float32")
    catch_up = CatchUp(*BETAS, EPS)
    update_rows(table, np.array([0]), np.full((1, DIM), 1e-3, np.float32), catch_up, LR)
    for _ in range(3000):
        catch_up.advance(LR)
    at_rest = _read_all(table, catch_up)
    update_rows(table, np.array([0]), np.zeros((1, DIM), np.float32), catch_up, LR)
    np.testing.assert_array_equal(table.weight, at_rest)
    np.testing.assert_array_equal(table.state[0], 0)


def test_after_a_sweep_nothing_is_left_to_catch_up() -> None:
    table = _table("float32")
    catch_up = _run(table, range(60))
    assert np.unique(table.last_step).size > 10
    _run(table, range(60, 61), catch_up, sweeps="always")
    assert np.unique(table.last_step).tolist() == [0, 61]
    np.testing.assert_array_equal(_read_all(table, catch_up), table.weight)


def test_moments_of_rows_that_sweeps_move_become_zero() -> None:
    """And not subnormal numbers, on which arithmetic is slow."""
    table = _table("float32")
    catch_up = CatchUp(*BETAS, EPS)
    rows, nothing = np.array([0]), np.empty((0, DIM), np.float32)
    sweep_rows(table, rows, np.full((1, DIM), 1e-3, np.float32), catch_up, LR)
    catch_up.advance(LR)
    for _ in range(3000):
        sweep_rows(table, rows[:0], nothing, catch_up, LR)
        catch_up.advance(LR)
    np.testing.assert_array_equal(table.state[0], 0)


@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
@pytest.mark.parametrize("sweeps", ["never", "at times"])
def test_result_is_the_same_for_any_number_of_threads(dtype: str, sweeps: str) -> None:
    tables, reads = [], []
    threads = numba.get_num_threads()
    for number in (1, threads):
        numba.set_num_threads(number)
        table = _table(dtype)
        catch_up = _run(table, range(30), sweeps=sweeps)
        tables.append(table)
        reads.append(_read_all(table, catch_up))
    _assert_same(*tables)
    np.testing.assert_array_equal(reads[0], reads[1])


@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
def test_places_scatter_what_rows_gather(dtype: str) -> None:
    table = _table(dtype)
    catch_up = _run(table, range(30))
    rng = np.random.default_rng(1)
    rows, places = rng.integers(0, ROWS, 700), rng.permutation(1000)[:700]
    whole = _read_all(table, catch_up)
    for read, expected in (
        (lambda *a: read_rows(table, rows, a[0], catch_up, *a[1:]), whole[rows]),
        (lambda *a: gather_rows(table.weight, rows, *a), table.weight[rows]),
    ):
        out, scattered = np.empty((700, DIM), table.weight.dtype), np.zeros((1000, DIM), table.weight.dtype)
        read(out)
        read(scattered, places)
        np.testing.assert_array_equal(out, expected)
        np.testing.assert_array_equal(scattered[places], expected)
        assert not np.delete(scattered, places, axis=0).any()


def test_no_rows_are_a_step_too() -> None:
    table = _table("float32")
    before = _copy(table)
    catch_up = CatchUp(*BETAS, EPS)
    update_rows(table, np.array([], np.int64), np.empty((0, DIM), np.float32), catch_up, LR)
    read_rows(table, np.array([], np.int64), np.empty((0, DIM), np.float32), catch_up)
    _assert_same(table, before)


def test_row_outside_the_table_is_an_error() -> None:
    table, catch_up = _table("float32"), CatchUp(*BETAS, EPS)
    for row in (-1, ROWS):
        with pytest.raises(IndexError, match=f"row {row} is outside a table of {ROWS} rows"):
            read_rows(table, np.array([0, row]), np.empty((2, DIM), np.float32), catch_up)
        with pytest.raises(IndexError, match=str(row)):
            gather_rows(table.weight, np.array([0, row]), np.empty((2, DIM), np.float32))
        with pytest.raises(IndexError, match=str(row)):
            update_rows(table, np.array([row]), np.empty((1, DIM), np.float32), catch_up, LR)
        with pytest.raises(IndexError, match=str(row)):
            sweep_rows(table, np.array([row]), np.empty((1, DIM), np.float32), catch_up, LR)


def test_rounded_rows_are_nearest_bfloat16_of_the_master() -> None:
    table = _table(SPLIT.name)
    catch_up = _run(table, range(40))
    read = bfloat16_to_float32(_read_all(table, catch_up))
    update_rows(table, np.arange(ROWS), np.zeros((ROWS, DIM), np.float32), catch_up, lr=0.0)
    # bfloat16 has 8 significant bits: half of the last one
    np.testing.assert_allclose(read, table.master(), rtol=2.0**-8, atol=0)


def test_sweep_is_chosen_where_a_step_uses_much_of_what_moves() -> None:
    assert is_for_sweep(500, 1000, 2000)
    assert not is_for_sweep(300, 1000, 2000)
    assert not is_for_sweep(1000, 1000, 10**6), "a sweep looks at every row of the table"
