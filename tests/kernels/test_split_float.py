"""A float32 in two halves of 16 bits, joined exactly."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from numba import njit

from engram_kernels.split_float import bfloat16_to_float32, high_half, join, low_half, round_to_bfloat16, split, whole

EDGES = (
    0,
    0x80000000,
    1,
    0x7F800000,
    0xFF800000,
    0x7F7FFFFF,
    0xFF7FFFFF,
    0x7FC00000,
    0xFFC00000,
    0x3F808000,
    0xFFFFFFFF,
)
SOME_BITS = np.concatenate(
    [np.array(EDGES, np.uint32), np.random.default_rng(0).integers(0, 2**32, 100_000, np.uint32)]
)


@njit
def _split_and_join(values, high, low, joined):
    for i in range(values.size):
        high[i], low[i] = high_half(values[i]), low_half(values[i])
    for i in range(values.size):
        joined[i] = whole(high[i], low[i])


def test_join_is_exact_for_every_kind_of_float() -> None:
    high, low = split(SOME_BITS.view(np.float32))
    np.testing.assert_array_equal(join(high, low).view(np.uint32), SOME_BITS)


def test_helpers_inside_kernels_are_the_same_functions() -> None:
    values = SOME_BITS.view(np.float32)
    high, low, joined = np.empty(values.size, np.uint16), np.empty(values.size, np.int16), np.empty_like(values)
    _split_and_join(values, high, low, joined)
    expected_high, expected_low = split(values)
    np.testing.assert_array_equal(high, expected_high)
    np.testing.assert_array_equal(low, expected_low)
    np.testing.assert_array_equal(joined.view(np.uint32), SOME_BITS)


@given(st.floats(width=32, allow_nan=False))
def test_high_half_is_a_nearest_bfloat16(value: float) -> None:
    ours = round_to_bfloat16(np.array([value], np.float32))
    torchs = torch.tensor([value], dtype=torch.float32).bfloat16()
    as_torch = torch.from_numpy(ours.view(np.int16)).view(torch.bfloat16)
    # torch takes ties to even, we away from zero: there the two neighbours are equally near
    exact, near, other = float(np.float32(value)), float(as_torch), float(torchs)
    assert near == other or abs(near - exact) == abs(other - exact)
    assert bfloat16_to_float32(ours)[0] == np.float32(near)
