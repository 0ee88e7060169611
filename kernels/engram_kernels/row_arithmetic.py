"""What the kernels of `row_adam` do to one row; the equations stand there.

`halves`: the records as int16 [n, 2S], whose last D columns complete bfloat16 weights; None where they are whole.
`work` [3, D]: the weights, and room for the moments, of one row. numba keeps compiled callers of these functions when
only this file changes: delete `__pycache__/row_adam*.nb?` then.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numba import njit

from engram_kernels.prefetch import prefetch_bytes
from engram_kernels.split_float import high_half, low_half, whole


class Constants(NamedTuple):
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


@njit(nogil=True, cache=True, inline="always")
def prefetch_row(array: Any, row: Any) -> None:
    stride = array.strides[0]
    prefetch_bytes(np.intp(array.ctypes.data) + row * stride, stride)


@njit(nogil=True, cache=True, inline="always")
def remainder_column(halves: Any, row_dim: Any, column: Any) -> Any:
    # Unsigned: a difference may be negative to the compiler, which then looks at every index and cannot vectorise.
    return np.uint64(halves.shape[1] - row_dim) + np.uint64(column)


@njit(nogil=True, cache=True)
def load_row(weight: Any, halves: Any, row: Any, work: Any) -> None:
    """The trained weights of `row` to work[0]."""
    for column in range(work.shape[1]):
        if halves is None:
            work[0, column] = weight[row, column]
        else:
            work[0, column] = whole(weight[row, column], halves[row, remainder_column(halves, work.shape[1], column)])


@njit(nogil=True, cache=True)
def store_row(weight: Any, halves: Any, row: Any, work: Any) -> None:
    for column in range(work.shape[1]):
        if halves is None:
            weight[row, column] = work[0, column]
        else:
            weight[row, column] = high_half(work[0, column])
            halves[row, remainder_column(halves, work.shape[1], column)] = low_half(work[0, column])


@njit(nogil=True, cache=True)
def store_copy(halves: Any, out: Any, place: Any, work: Any) -> None:
    for column in range(work.shape[1]):
        if halves is None:
            out[place, column] = work[0, column]
        else:
            out[place, column] = high_half(work[0, column])


@njit(nogil=True, cache=True, error_model="numpy")
def catch_up_row(
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
def adam_row(state: Any, row: Any, gradients: Any, i: Any, decay1: Any, decay2: Any, constants: Any, work: Any) -> None:
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


@njit(nogil=True, cache=True, error_model="numpy")
def adam_in_place(weight: Any, halves: Any, state: Any, row: Any, gradients: Any, i: Any, constants: Any) -> None:
    """`adam_row` on a row that missed no step, in one pass over it."""
    row_dim = weight.shape[1]
    for column in range(row_dim):
        g = gradients[i, column] * constants.scale
        m = state[row, column]
        m += constants.one_minus_beta1 * (g - m)
        v = constants.beta2 * state[row, row_dim + column] + constants.one_minus_beta2 * (g * g)
        m = m if abs(m) >= constants.tiny else constants.zero
        movement = constants.step_size * (m / (math.sqrt(v) * constants.inverse_root + constants.eps))
        state[row, column] = m
        state[row, row_dim + column] = v
        if halves is None:
            weight[row, column] -= movement
        else:
            moved = whole(weight[row, column], halves[row, remainder_column(halves, row_dim, column)]) - movement
            weight[row, column] = high_half(moved)
            halves[row, remainder_column(halves, row_dim, column)] = low_half(moved)
