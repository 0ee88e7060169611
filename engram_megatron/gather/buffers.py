"""Host memory for the arrays of a step, used again by the next one.

A step's rows and gradients take hundreds of megabytes. Fresh memory of that size comes from the kernel page by page,
which was measured to take ten times as long as writing it; what a step has let go the next one takes.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet, WeakValueDictionary

import numpy as np
import torch.distributed as dist
from numpy.typing import DTypeLike, NDArray

from engram_megatron.tables.node_memory import MemoryHandle, NodeMemory

Bytes = NDArray[np.uint8]
Shape = tuple[int, ...]

ROOM = 1.25  # batches differ a little from step to step


@dataclass(frozen=True, eq=False)
class _Buffer:
    bytes: Bytes
    memory: NodeMemory | None = None  # that others can open


class BufferPool:
    """Arrays whose memory comes back to the pool when nothing refers to it any more, neither the array nor a view.

    It holds as many buffers as were ever in use at once, each as large as was ever asked for. Threads may share it.
    """

    def __init__(self) -> None:
        self._free: list[_Buffer] = []
        self._lent: WeakValueDictionary[int, _Loan] = WeakValueDictionary()  # by address
        self._taking = threading.Lock()

    def empty(self, shape: Shape, dtype: DTypeLike) -> NDArray[Any]:
        """An array like `np.empty`'s."""
        dtype, count = np.dtype(dtype), int(np.prod(shape, dtype=np.int64))
        if count == 0:
            return np.empty(shape, dtype)
        loan = _Loan(self._take(count * dtype.itemsize), self._free)
        array: NDArray[Any] = np.frombuffer(loan, dtype, count).reshape(shape)  # type: ignore[call-overload]
        self._lent[array.ctypes.data] = loan
        return array

    def _take(self, num_bytes: int) -> _Buffer:
        with self._taking:
            # Loans that end meanwhile append: places before the end stay what they are.
            sizes = [buffer.bytes.size for buffer in self._free]
            large = [place for place, size in enumerate(sizes) if size >= num_bytes]
            if large:
                return self._free.pop(min(large, key=lambda place: sizes[place]))
            if sizes:
                self._free.pop(int(np.argmax(sizes)))  # a larger one takes its place
        return self._allocate(int(num_bytes * ROOM))

    def _allocate(self, num_bytes: int) -> _Buffer:
        return _Buffer(np.empty(num_bytes, np.uint8))


class _Loan:
    """What an array keeps alive as long as it lives; then the buffer is free."""

    def __init__(self, buffer: _Buffer, free: list[_Buffer]) -> None:
        self.buffer = buffer
        self._free = free

    def __buffer__(self, flags: int) -> memoryview:
        return memoryview(self.buffer.bytes)

    def __del__(self) -> None:
        self._free.append(self.buffer)


class SharedBufferPool(BufferPool):
    """A pool of each rank of a node, whose arrays the others can read.

    `group` holds the ranks of the node, None if there is one.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        super().__init__()
        self.group = group
        self._made: WeakSet[NodeMemory] = WeakSet()
        self._opened: dict[MemoryHandle, NodeMemory] = {}

    def share(self, array: NDArray[Any]) -> list[NDArray[Any]]:
        """The arrays that all ranks of the node give, by number on the node; `array`, one of `empty`'s, is this one's.
        All have one dtype.

        Collective. An array lives as long as the rank that gave it refers to it: barriers must say when the others have
        read it.
        """
        if self.group is None:
            return [array]
        memory = self._lent[array.ctypes.data].buffer.memory if array.size > 0 else None
        mine = (None if memory is None else memory.handle, array.shape, {made.handle for made in self._made})
        told: list[Any] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(told, mine, group=self.group)
        alive = set().union(*(handles for _, _, handles in told))
        self._opened = {handle: memory for handle, memory in self._opened.items() if handle in alive}
        rank = dist.get_rank(self.group)
        return [
            array if source == rank else self._view(handle, shape, array.dtype)
            for source, (handle, shape, _) in enumerate(told)
        ]

    def _view(self, handle: MemoryHandle | None, shape: Shape, dtype: np.dtype[Any]) -> NDArray[Any]:
        if handle is None:
            return np.empty(shape, dtype)
        if handle not in self._opened:
            self._opened[handle] = NodeMemory.open(handle)
        return self._opened[handle].array(shape, dtype)

    def _allocate(self, num_bytes: int) -> _Buffer:
        memory = NodeMemory.create(num_bytes)
        self._made.add(memory)
        return _Buffer(memory.array((num_bytes,), np.uint8), memory)
