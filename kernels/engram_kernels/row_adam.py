"""Adam on the rows that a step used, equal to Adam on the whole table as one dense weight; and reads to go with it.

A row is caught up with the steps that it missed when it is used (`catch_up`). Reading brings it to date in the copy
only, so reads may run at any time between updates, on any number of threads, and nothing depends on who read what.
A step that uses a large share of the rows moves all of them instead (`sweep_rows`): in order of memory a row costs a
third of what it costs elsewhere, and reads then find nothing to catch up.

A step with gradient g, in torch's form (`torch.optim.Adam`; Kingma & Ba, arXiv 1412.6980):

    m <- m + (1 - beta1) (g - m)        v <- beta2 v + (1 - beta2) g^2
    w <- w - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

Float32 and bfloat16 tables compute in float32, float64 tables in float64. The arithmetic of a bfloat16 table is that of
a float32 one to the bit; its remainders hold what bfloat16 does not. A moment that decays below the smallest normal
number becomes zero: such a first moment moves no weight, and arithmetic on subnormal numbers is many times slower. A
denominator of zero (moments of zero without eps) counts as one.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit, prange
from numpy.typing import NDArray

from engram_kernels.catch_up import CatchUp
from engram_kernels.gather_rows import check_rows, checked_places
from engram_kernels.row_arithmetic import (
    Constants,
    adam_in_place,
    adam_row,
    catch_up_row,
    load_row,
    prefetch_row,
    store_copy,
    store_row,
)
from engram_kernels.row_state import RowState

_ROWS_AHEAD = 6  # of a dozen cache lines each
_ROWS_PER_TASK = 256
_ROWS_PER_SWEEP_TASK = 4096
_STEPS_BETWEEN_SETTLING = 64
# Measured where rows are 80 wide: the share of the rows with moments at which both ways to update take as long
_SWEEP_SHARE = 0.4


def read_rows(
    table: RowState,
    rows: NDArray[np.int64],
    out: NDArray[Any],
    catch_up: CatchUp,
    places: NDArray[np.int64] | None = None,
) -> None:
    """Weights of `rows` as of step `catch_up.step`, into out[i] or out[places[i]]; the table is left as it is.

    rows and places int64 [k]; out [k, D] (with places: as long as they reach) of the weights' dtype. bfloat16 rows are
    caught up in float32 and rounded. Raises `IndexError` for a row outside the table.
    """
    check_rows(rows, table.num_rows)
    _read(
        table.weight,
        _halves(table),
        table.state,
        table.last_step,
        rows,
        out,
        checked_places(table.weight, rows, out, places),
        catch_up.tables(),
        _constants(table, catch_up, 0.0, 1.0),
        catch_up.step,
        catch_up.window or catch_up.step,
        catch_up.is_closed,
    )


def update_rows(
    table: RowState,
    rows: NDArray[np.int64],
    gradients: NDArray[Any],
    catch_up: CatchUp,
    lr: float,
    scale: float = 1.0,
    *,
    touched_only: bool = False,
) -> None:
    """Take step `catch_up.step + 1` with gradient * scale on `rows`; `catch_up.advance(lr)` completes it afterwards.

    rows int64 [u], strictly rising; gradients [u, D] of the table's type of arithmetic. Rows that missed steps are
    caught up first, so that all other rows may be left alone. `touched_only`: they are not, and neither weights nor
    moments of a row move in a step that did not use it (`torch.optim.SparseAdam`); `gather_rows` then reads the rows.
    Raises `IndexError` for a row outside the table.
    """
    _update(*_update_arguments(table, rows, gradients, catch_up, lr, scale), touched_only)


def is_for_sweep(num_updated: int, num_moving: int, num_rows: int) -> bool:
    """Whether a step that updates `num_updated` of the `num_moving` rows that ever had a gradient, out of `num_rows` in
    all, is faster with `sweep_rows` than with `update_rows`."""
    return num_updated >= _SWEEP_SHARE * num_moving and num_moving >= num_rows / 16


def sweep_rows(
    table: RowState,
    rows: NDArray[np.int64],
    gradients: NDArray[Any],
    catch_up: CatchUp,
    lr: float,
    scale: float = 1.0,
) -> None:
    """As `update_rows`, and brings all other rows to step `catch_up.step + 1` as well.

    A second moment that has decayed below the smallest normal number may wait some steps until it becomes zero.
    """
    _sweep(*_update_arguments(table, rows, gradients, catch_up, lr, scale))


def _update_arguments(
    table: RowState, rows: NDArray[np.int64], gradients: NDArray[Any], catch_up: CatchUp, lr: float, scale: float
) -> tuple[Any, ...]:
    """What both kernels that move rows take, checked."""
    check_rows(rows, table.num_rows)
    assert _is_strictly_rising(rows), "the rows of an update must rise strictly"
    assert gradients.shape == (rows.size, table.row_dim), (gradients.shape, rows.size, table.row_dim)
    assert gradients.dtype == table.state.dtype, (gradients.dtype, table.state.dtype)
    return (
        table.weight,
        _halves(table),
        table.state,
        table.last_step,
        rows,
        gradients,
        catch_up.tables(),
        _constants(table, catch_up, lr, scale),
        catch_up.step,
        catch_up.window or catch_up.step,
        catch_up.is_closed,
    )


def _constants(table: RowState, catch_up: CatchUp, lr: float, scale: float) -> Constants:
    step = catch_up.step + 1
    beta1, beta2 = catch_up.beta1, catch_up.beta2
    convert = table.state.dtype.type
    return Constants(
        scale=convert(scale),
        beta1=convert(beta1),
        beta2=convert(beta2),
        one_minus_beta1=convert(1.0 - beta1),
        one_minus_beta2=convert(1.0 - beta2),
        step_size=convert(lr / (1.0 - beta1**step)),
        inverse_root=convert(1.0 / math.sqrt(1.0 - beta2**step)),
        eps=convert(catch_up.eps),
        tiny=np.finfo(table.state.dtype).tiny,
        zero=convert(0),
        one=convert(1),
    )


def _halves(table: RowState) -> NDArray[np.int16] | None:
    """The records as int16 [n, 2S], remainders from column 4D on; None where the weights are whole.

    Not `table.remainder`: only whole rows are an array that the compiler knows to be contiguous, and vectorises.
    """
    return table.state.view(np.int16) if table.is_split else None


@njit(nogil=True, cache=True)
def _is_strictly_rising(rows: Any) -> Any:
    rising = True
    for i in range(1, rows.size):
        rising &= rows[i - 1] < rows[i]
    return rising


@njit(nogil=True, cache=True, parallel=True, error_model="numpy")
def _read(
    weight: Any,
    halves: Any,
    state: Any,
    last_step: Any,
    rows: Any,
    out: Any,
    places: Any,
    tables: Any,
    constants: Any,
    step: Any,
    window: Any,
    is_closed: Any,
) -> None:
    row_dim = weight.shape[1]
    for task in prange((rows.size + _ROWS_PER_TASK - 1) // _ROWS_PER_TASK):
        start = np.int64(task) * _ROWS_PER_TASK
        work = np.empty((3, row_dim), state.dtype)  # weights, moments of one row
        for i in range(start, min(start + _ROWS_PER_TASK, rows.size)):
            if i + 2 * _ROWS_AHEAD < rows.size:
                prefetch_row(last_step, rows[i + 2 * _ROWS_AHEAD])
            if i + _ROWS_AHEAD < rows.size:
                coming = rows[i + _ROWS_AHEAD]
                prefetch_row(weight, coming)
                if 0 < last_step[coming] < step:
                    prefetch_row(state, coming)
            row = rows[i]
            place = places[i] if places.size > 0 else i
            last = np.int64(last_step[row])
            if 0 < last < step:
                load_row(weight, halves, row, work)
                catch_up_row(state, row, last, step, tables, constants, window, is_closed, work)
                store_copy(halves, out, place, work)
            else:
                for column in range(row_dim):
                    out[place, column] = weight[row, column]


@njit(nogil=True, cache=True, parallel=True, error_model="numpy")
def _update(
    weight: Any,
    halves: Any,
    state: Any,
    last_step: Any,
    rows: Any,
    gradients: Any,
    tables: Any,
    constants: Any,
    steps_done: Any,
    window: Any,
    is_closed: Any,
    touched_only: Any,
) -> None:
    row_dim = weight.shape[1]
    for task in prange((rows.size + _ROWS_PER_TASK - 1) // _ROWS_PER_TASK):
        start = np.int64(task) * _ROWS_PER_TASK
        work = np.empty((3, row_dim), state.dtype)  # weights, moments of one row
        for i in range(start, min(start + _ROWS_PER_TASK, rows.size)):
            if i + _ROWS_AHEAD < rows.size:
                coming = rows[i + _ROWS_AHEAD]
                prefetch_row(last_step, coming)
                prefetch_row(weight, coming)
                prefetch_row(state, coming)
            row = rows[i]
            last = np.int64(last_step[row])
            decay1, decay2 = constants.one, constants.one
            load_row(weight, halves, row, work)
            if 0 < last < steps_done and not touched_only:
                catch_up_row(state, row, last, steps_done, tables, constants, window, is_closed, work)
                decay1 = state.dtype.type(tables.powers1[steps_done - last])
                decay2 = state.dtype.type(tables.powers2[steps_done - last])
            adam_row(state, row, gradients, i, decay1, decay2, constants, work)
            store_row(weight, halves, row, work)
            last_step[row] = steps_done + 1


@njit(nogil=True, cache=True, parallel=True, error_model="numpy")
def _sweep(
    weight: Any,
    halves: Any,
    state: Any,
    last_step: Any,
    rows: Any,
    gradients: Any,
    tables: Any,
    constants: Any,
    steps_done: Any,
    window: Any,
    is_closed: Any,
) -> None:
    num_rows, row_dim = weight.shape
    # Where rows move in every step their second moments would stay subnormal: they become zero only now and then, in
    # the arithmetic that looks for it.
    settles = steps_done % _STEPS_BETWEEN_SETTLING == 0 or constants.eps == constants.zero
    for task in prange((num_rows + _ROWS_PER_SWEEP_TASK - 1) // _ROWS_PER_SWEEP_TASK):
        start = np.int64(task) * _ROWS_PER_SWEEP_TASK
        work = np.empty((3, row_dim), state.dtype)  # weights, moments of one row
        nothing = np.zeros((1, row_dim), state.dtype)
        coming = np.searchsorted(rows, start)
        for row in range(start, min(start + _ROWS_PER_SWEEP_TASK, num_rows)):
            has_gradient = coming < rows.size and rows[coming] == row
            last = np.int64(last_step[row])
            if last == 0 and not has_gradient:
                continue
            gradient = gradients if has_gradient else nothing
            i = coming if has_gradient else 0
            if 0 < last < steps_done or settles:
                load_row(weight, halves, row, work)
                if 0 < last < steps_done:
                    catch_up_row(state, row, last, steps_done, tables, constants, window, is_closed, work)
                decay1 = state.dtype.type(tables.powers1[steps_done - last])
                decay2 = state.dtype.type(tables.powers2[steps_done - last])
                adam_row(state, row, gradient, i, decay1, decay2, constants, work)
                store_row(weight, halves, row, work)
            else:
                adam_in_place(weight, halves, state, row, gradient, i, constants)
            last_step[row] = steps_done + 1
            coming += has_gradient
