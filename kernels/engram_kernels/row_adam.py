"""Adam on the rows that a step used, equal to Adam on the whole table as one dense weight; and reads to go with it.

A row is caught up with the steps that it missed when it is used (`catch_up`). Reading brings it to date in the copy
only, so reads may run at any time between updates, on any number of threads, and nothing depends on who read what.

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
from typing import Any, NamedTuple

import numpy as np
from numba import njit, prange
from numpy.typing import NDArray

from engram_kernels.catch_up import CatchUp
from engram_kernels.gather_rows import check_rows, checked_places
from engram_kernels.prefetch import prefetch_bytes
from engram_kernels.row_state import RowState
from engram_kernels.split_float import high_half, low_half, whole

_ROWS_AHEAD = 6  # of a dozen cache lines each
_ROWS_PER_TASK = 256


class _Constants(NamedTuple):
    """Scalars of a call in the table's type of arithmetic, so that the kernels compute in it."""

    scale: Any  # of the gradients
    beta1: Any
    beta2: Any
    one_minus_beta1: Any
    one_minus_beta2: Any
    step_size: Any  # lr / (1 - beta1^t)
    inverse_root: Any  # 1 / sqrt(1 - beta2^t)
    eps: Any
    tiny: Any
    zero: Any
    one: Any


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
    check_rows(rows, table.num_rows)
    assert _is_strictly_rising(rows), "the rows of an update must rise strictly"
    assert gradients.shape == (rows.size, table.row_dim), (gradients.shape, rows.size, table.row_dim)
    assert gradients.dtype == table.state.dtype, (gradients.dtype, table.state.dtype)
    _update(
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
        touched_only,
    )


def _constants(table: RowState, catch_up: CatchUp, lr: float, scale: float) -> _Constants:
    step = catch_up.step + 1
    beta1, beta2 = catch_up.beta1, catch_up.beta2
    convert = table.state.dtype.type
    return _Constants(
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
                _prefetch_row(last_step, rows[i + 2 * _ROWS_AHEAD])
            if i + _ROWS_AHEAD < rows.size:
                coming = rows[i + _ROWS_AHEAD]
                _prefetch_row(weight, coming)
                if 0 < last_step[coming] < step:
                    _prefetch_row(state, coming)
            row = rows[i]
            place = places[i] if places.size > 0 else i
            last = np.int64(last_step[row])
            if 0 < last < step:
                _load_row(weight, halves, row, work)
                _catch_up_row(state, row, last, step, tables, constants, window, is_closed, work)
                _store_copy(halves, out, place, work)
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
                _prefetch_row(last_step, coming)
                _prefetch_row(weight, coming)
                _prefetch_row(state, coming)
            row = rows[i]
            last = np.int64(last_step[row])
            decay1, decay2 = constants.one, constants.one
            _load_row(weight, halves, row, work)
            if 0 < last < steps_done and not touched_only:
                _catch_up_row(state, row, last, steps_done, tables, constants, window, is_closed, work)
                decay1 = state.dtype.type(tables.powers1[steps_done - last])
                decay2 = state.dtype.type(tables.powers2[steps_done - last])
            _adam_row(state, row, gradients, i, decay1, decay2, constants, work)
            _store_row(weight, halves, row, work)
            last_step[row] = steps_done + 1


@njit(nogil=True, cache=True, inline="always")
def _prefetch_row(array: Any, row: Any) -> None:
    stride = array.strides[0]
    prefetch_bytes(np.intp(array.ctypes.data) + row * stride, stride)


@njit(nogil=True, cache=True)
def _load_row(weight: Any, halves: Any, row: Any, work: Any) -> None:
    """The trained weights of `row` to work[0]."""
    for column in range(work.shape[1]):
        if halves is None:
            work[0, column] = weight[row, column]
        else:
            work[0, column] = whole(weight[row, column], halves[row, 4 * work.shape[1] + column])


@njit(nogil=True, cache=True)
def _store_row(weight: Any, halves: Any, row: Any, work: Any) -> None:
    for column in range(work.shape[1]):
        if halves is None:
            weight[row, column] = work[0, column]
        else:
            weight[row, column] = high_half(work[0, column])
            halves[row, 4 * work.shape[1] + column] = low_half(work[0, column])


@njit(nogil=True, cache=True)
def _store_copy(halves: Any, out: Any, place: Any, work: Any) -> None:
    for column in range(work.shape[1]):
        if halves is None:
            out[place, column] = work[0, column]
        else:
            out[place, column] = high_half(work[0, column])


@njit(nogil=True, cache=True, error_model="numpy")
def _catch_up_row(
    state: Any,
    row: Any,
    last: Any,
    step: Any,
    tables: Any,
    constants: Any,
    window: Any,
    is_closed: Any,
    work: Any,
) -> None:
    """Move work[0] by what dense Adam did to it in the steps last + 1 .. step."""
    row_dim = work.shape[1]
    if is_closed:
        total = state.dtype.type(tables.sums[last])
        for column in range(row_dim):
            denominator = math.sqrt(state[row, row_dim + column]) + constants.eps
            denominator = denominator if denominator > constants.zero else constants.one
            work[0, column] -= total * (state[row, column] / denominator)
        return
    for column in range(row_dim):
        work[1, column] = state[row, column]
        work[2, column] = state[row, row_dim + column]
    for past in range(last + 1, min(step, last + window) + 1):
        step_size = state.dtype.type(tables.learning_rates[past] / (1.0 - tables.powers1[past]))
        inverse_root = state.dtype.type(1.0 / math.sqrt(1.0 - tables.powers2[past]))
        for column in range(row_dim):
            m = constants.beta1 * work[1, column]
            v = constants.beta2 * work[2, column]
            m = m if abs(m) >= constants.tiny else constants.zero
            v = v if v >= constants.tiny or m != constants.zero else constants.zero
            denominator = math.sqrt(v) * inverse_root + constants.eps
            denominator = denominator if denominator > constants.zero else constants.one
            work[0, column] -= step_size * (m / denominator)
            work[1, column] = m
            work[2, column] = v


@njit(nogil=True, cache=True, error_model="numpy")
def _adam_row(
    state: Any, row: Any, gradients: Any, i: Any, decay1: Any, decay2: Any, constants: Any, work: Any
) -> None:
    """One step on work[0] and on the moments of `row`, which decay first by what they missed."""
    row_dim = work.shape[1]
    for column in range(row_dim):
        g = gradients[i, column] * constants.scale
        m = decay1 * state[row, column]
        v = decay2 * state[row, row_dim + column]
        m += constants.one_minus_beta1 * (g - m)
        v = constants.beta2 * v + constants.one_minus_beta2 * (g * g)
        m = m if abs(m) >= constants.tiny else constants.zero
        v = v if v >= constants.tiny or m != constants.zero else constants.zero
        state[row, column] = m
        state[row, row_dim + column] = v
        denominator = math.sqrt(v) * constants.inverse_root + constants.eps
        denominator = denominator if denominator > constants.zero else constants.one
        work[0, column] -= constants.step_size * (m / denominator)
