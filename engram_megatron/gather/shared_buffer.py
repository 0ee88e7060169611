"""A buffer of each rank that all ranks of its node read: received rows, and gradients on their way."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray

from engram_megatron.tables.node_memory import MemoryHandle, NodeMemory


class SharedBuffers:
    """One buffer per rank of a node, found by the rank's number on the node; they grow as needed, never shrink.

    `group` holds the ranks of the node, None if there is one. `reserve` is collective over it.
    """

    def __init__(self, group: dist.ProcessGroup | None, rail: int, row_dim: int, dtype: np.dtype[Any]) -> None:
        self.group = group
        self.rail = rail
        self.row_dim = row_dim
        self.dtype = dtype
        size = 1 if group is None else dist.get_world_size(group)
        self._handles: list[MemoryHandle | None] = [None] * size
        self._memories: list[NodeMemory | None] = [None] * size

    def reserve(self, num_rows: int) -> None:
        """Make room for `num_rows` rows in this rank's buffer. Only while no rank reads a buffer."""
        num_bytes = num_rows * self.row_dim * self.dtype.itemsize
        mine = self._memories[self.rail]
        if mine is None or mine.handle.num_bytes < num_bytes:
            mine = NodeMemory.create(num_bytes + num_bytes // 4)  # batches differ a little: leave room
            self._memories[self.rail] = mine
        if self.group is None:
            return
        handles: list[MemoryHandle | None] = [None] * len(self._handles)
        dist.all_gather_object(handles, mine.handle, group=self.group)
        for rail, handle in enumerate(handles):
            if rail != self.rail and handle != self._handles[rail] and handle is not None:
                self._memories[rail] = NodeMemory.open(handle)
        self._handles = handles

    def rows(self, rail: int, num_rows: int) -> NDArray[Any]:
        """The first rows [num_rows, row_dim] of a rank's buffer; a view."""
        memory = self._memories[rail]
        assert memory is not None
        return memory.array((num_rows, self.row_dim), self.dtype)
