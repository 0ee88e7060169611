"""Initial rows: a pure function of (seed, row id, column), whatever the layout, the machine count or the order.

Each pair of columns is one block of Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3",
SC 2011) with the seed as key and (row id, pair number) as counter, so no two values ever share random bits. Its 128
bits make two uniforms, and Box-Muller turns them into two independent N(0, 1) values in float64.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit, prange
from numpy.typing import NDArray

_MASK = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_MULTIPLIER_0 = np.uint64(0xD2511F53)
_MULTIPLIER_1 = np.uint64(0xCD9E8D57)
_KEY_STEP_0 = np.uint64(0x9E3779B9)
_KEY_STEP_1 = np.uint64(0xBB67AE85)
_TO_53_BITS = np.uint64(11)
_ULP = 2.0**-53


def fill_initial_rows(out: NDArray[Any], first_row: int, seed: int, std: float) -> None:
    """Write the initial values of rows first_row .. first_row + n - 1 into `out` [n, row_dim], float32 or float64.

    Values are N(0, std^2), computed in float64 and rounded once to the dtype of `out`.
    """
    assert out.flags.c_contiguous
    _fill(out, np.uint64(first_row), np.uint64(seed % 2**64), std)


def initial_rows(rows: NDArray[np.int64], row_dim: int, dtype: Any, seed: int, std: float) -> NDArray[Any]:
    """The initial values [n, row_dim] of the rows with ids `rows` int64 [n], as `fill_initial_rows` gives them."""
    out = np.empty((rows.size, row_dim), dtype)
    _fill_rows(out, rows, np.uint64(seed % 2**64), std)
    return out


@njit(cache=True, parallel=True, nogil=True)
def _fill(out: Any, first_row: Any, seed: Any, std: float) -> None:
    for i in prange(out.shape[0]):
        _fill_row(out, i, first_row + np.uint64(i), seed, std)


@njit(cache=True, parallel=True, nogil=True)
def _fill_rows(out: Any, rows: Any, seed: Any, std: float) -> None:
    for i in prange(rows.size):
        _fill_row(out, i, np.uint64(rows[i]), seed, std)


@njit(cache=True)
def _fill_row(out: Any, i: Any, row: Any, seed: Any, std: float) -> None:
    row_dim = out.shape[1]
    for pair in range((row_dim + 1) // 2):
        high, low = philox_pair(seed, row, np.uint64(pair))
        # In (0, 1]: the logarithm of zero never occurs.
        radius = std * math.sqrt(-2.0 * math.log((float(high >> _TO_53_BITS) + 1.0) * _ULP))
        angle = 2.0 * math.pi * float(low >> _TO_53_BITS) * _ULP
        out[i, 2 * pair] = radius * math.cos(angle)
        if 2 * pair + 1 < row_dim:
            out[i, 2 * pair + 1] = radius * math.sin(angle)


@njit(cache=True)
def philox_pair(key: Any, counter_low: Any, counter_high: Any) -> Any:
    """Philox4x32-10 of a 64-bit key and a 128-bit counter, all uint64: two uint64 (words 1:0 and 3:2 of the output)."""
    k0, k1 = key & _MASK, key >> _HALF
    c0, c1 = counter_low & _MASK, counter_low >> _HALF
    c2, c3 = counter_high & _MASK, counter_high >> _HALF
    for _ in range(10):
        product_0 = _MULTIPLIER_0 * c0
        product_1 = _MULTIPLIER_1 * c2
        c0, c1 = (product_1 >> _HALF) ^ c1 ^ k0, product_1 & _MASK
        c2, c3 = (product_0 >> _HALF) ^ c3 ^ k1, product_0 & _MASK
        k0 = (k0 + _KEY_STEP_0) & _MASK
        k1 = (k1 + _KEY_STEP_1) & _MASK
    return c0 | (c1 << _HALF), c2 | (c3 << _HALF)
