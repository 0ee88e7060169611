"""A float32 in two parts of 16 bits: a bfloat16 that is worth reading alone, and what it lacks.

    bfloat16 bits = (float32 bits + 0x8000) >> 16          nearest, ties away from zero
    remainder     = float32 bits - (bfloat16 bits << 16)   in -0x8000 .. 0x7fff, an int16

so that the remainder is the low half of the float32 read as a signed number, and `join` is exact for every float32:
infinities, subnormals, both zeros. (The largest finite numbers round up to the bfloat16 infinity, as they must, and
still join exactly.) A NaN joins to itself; its bfloat16 is a NaN too for those that arithmetic makes (0x7fc00000,
0xffc00000), while a NaN whose mantissa is all ones rounds to a zero.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from numpy.typing import NDArray


def split(values: NDArray[np.float32]) -> tuple[NDArray[np.uint16], NDArray[np.int16]]:
    """The bfloat16 bits (uint16) and remainders (int16) of float32 `values`, in their shape."""
    assert values.dtype == np.float32, values.dtype
    bits = np.ascontiguousarray(values).view(np.uint32)
    return round_to_bfloat16(values), bits.astype(np.uint16).view(np.int16)


def join(bfloat16_bits: NDArray[np.uint16], remainders: NDArray[np.int16]) -> NDArray[np.float32]:
    """The float32 that `split` took apart, bit for bit."""
    assert bfloat16_bits.dtype == np.uint16, bfloat16_bits.dtype
    assert remainders.dtype == np.int16, remainders.dtype
    high = bfloat16_bits.astype(np.uint32) << np.uint32(16)
    return (high + remainders.astype(np.int32).view(np.uint32)).view(np.float32)


def round_to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The nearest bfloat16 of float32 `values` as bits, ties away from zero."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    return ((bits + np.uint32(0x8000)) >> np.uint32(16)).astype(np.uint16)


def bfloat16_to_float32(bfloat16_bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """The float32 of the same value."""
    return (bfloat16_bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


@intrinsic
def float32_bits(typing_context: Any, value: Any) -> Any:
    """uint32 with the bits of a float32; inside kernels, where it costs no instruction."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(32))

    return (types.uint32(types.float32), generate) if value == types.float32 else None


@intrinsic
def float32_from_bits(typing_context: Any, bits: Any) -> Any:
    """float32 with the bits of a uint32; inside kernels."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return (types.float32(types.uint32), generate) if bits == types.uint32 else None


# numba types arithmetic of uint32 with a literal as int64; every step is cast back so that the loops stay 32 bits wide.


@njit(nogil=True, cache=True, inline="always")
def high_half(value: Any) -> Any:
    """bfloat16 bits (uint16) of a float32; inside kernels."""
    return np.uint16(np.uint32(float32_bits(value) + np.uint32(0x8000)) >> np.uint32(16))


@njit(nogil=True, cache=True, inline="always")
def low_half(value: Any) -> Any:
    """Remainder (int16) of a float32; inside kernels."""
    return np.int16(float32_bits(value))


@njit(nogil=True, cache=True, inline="always")
def whole(bfloat16_bits: Any, remainder: Any) -> Any:
    """float32 of bfloat16 bits and remainder; inside kernels."""
    return float32_from_bits(np.uint32(np.uint32(np.uint32(bfloat16_bits) << np.uint32(16)) + np.uint32(remainder)))
