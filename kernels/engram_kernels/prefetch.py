"""Asking for memory before it is needed. Random rows are bound by latency, which asking ahead hides."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

CACHE_LINE = 64  # bytes


@intrinsic
def _prefetch_line(typing_context: Any, address: Any) -> Any:
    """Load the cache line of a byte address into the second cache; a wrong address does nothing."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        i32 = ir.IntType(32)
        byte_pointer = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [byte_pointer, i32, i32, i32])
        name = "llvm.prefetch.p0i8" if not byte_pointer.is_opaque else "llvm.prefetch.p0"
        function = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
        # to be read (0), into the second cache (2), which has more requests under way than the first; data (1)
        builder.call(function, [builder.inttoptr(arguments[0], byte_pointer), i32(0), i32(2), i32(1)])
        return context.get_dummy_value()

    return types.void(types.intp), generate


@njit(nogil=True, cache=True, inline="always")
def prefetch_bytes(address: Any, num_bytes: Any) -> None:
    """Ask for the cache lines of `num_bytes` bytes from `address` on; inside kernels."""
    for offset in range(0, num_bytes + CACHE_LINE - 1, CACHE_LINE):
        _prefetch_line(address + offset)
