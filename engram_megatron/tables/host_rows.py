"""Rows in memory, all of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram_kernels.catch_up import CatchUp
from engram_kernels.copy_rows import copy_rows
from engram_kernels.row_state import RowState
from engram_megatron.tables.host_memory import check_host_memory
from engram_megatron.tables.node_memory import HugePages, MemoryHandle, NodeMemory, bytes_of_arrays
from engram_megatron.tables.row_layout import RowLayout
from engram_megatron.tables.row_store import Commit, Int64, RowFormat, RowPart, read_weights


@dataclass(frozen=True, kw_only=True)
class HostPlacement:
    """In the memory of the host."""

    commit: Commit = "eager"
    huge_pages: HugePages = "none"

    def __str__(self) -> str:
        return self.commit

    def check(self, layout: RowLayout, row_format: RowFormat, shards_on_host: int, touched_rows: int) -> None:
        """Raise `UsageError` where the memory does not suffice."""
        row_dim, dtype, touched = row_format.row_dim, row_format.dtype, touched_rows if self.commit == "lazy" else None
        check_host_memory(layout, row_dim, dtype, shards_on_host, touched, row_format.moments)

    def create(self, num_rows: int, row_format: RowFormat) -> HostRows:
        """Nothing is resident before it is written or `commit` is called."""
        memory = NodeMemory.create(bytes_of_arrays(row_format.specs(num_rows)), self.huge_pages)
        return HostRows(row_format, num_rows, memory, is_sparse=self.commit == "lazy")


@dataclass(frozen=True)
class HostHandle:
    """Names `HostRows` to other processes of the node."""

    format: RowFormat
    num_rows: int
    memory: MemoryHandle
    is_sparse: bool

    def open(self) -> HostRows:
        return HostRows(self.format, self.num_rows, NodeMemory.open(self.memory), is_sparse=self.is_sparse)


class HostRows:
    """`table`: all rows, in memory that the ranks of the node share."""

    def __init__(self, row_format: RowFormat, num_rows: int, memory: NodeMemory, *, is_sparse: bool) -> None:
        self.format = row_format
        self.memory = memory
        self.is_sparse = is_sparse
        self.table = RowState(*memory.arrays(row_format.specs(num_rows)))
        self.last_step = self.table.last_step

    @property
    def handle(self) -> HostHandle:
        return HostHandle(self.format, self.table.num_rows, self.memory.handle, self.is_sparse)

    def commit(self) -> None:
        self.memory.commit()

    def read(self, rows: Int64, catch_up: CatchUp | None, out: NDArray[Any], places: Int64 | None) -> None:
        read_weights(self.table, rows, catch_up, out, places)

    def exact(self, rows: Int64) -> RowState:
        return self.table.exact(rows)

    def copy_to(self, rows: Int64, target: RowState, places: Int64) -> None:
        copy_rows((self.table.weight, self.table.state), rows, (target.weight, target.state), places)
        target.last_step[places] = self.last_step[rows]

    def write(self, rows: Int64, values: RowState) -> None:
        self.table.set_exact(rows, values)

    def updating(self, rows: Int64, is_new: NDArray[np.bool_]) -> Iterator[RowPart]:
        yield RowPart(slice(None), self.table, rows)

    def sweeping(self, rows: Int64, is_new: NDArray[np.bool_]) -> Iterator[RowPart]:
        yield RowPart(slice(None), self.table, rows)

    def read_ahead(self, rows: Int64) -> None:
        """Nothing: memory is near."""
