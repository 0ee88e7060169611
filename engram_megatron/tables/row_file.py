"""Rows in a memory-mapped file on a disk: one record a row, so that a row takes one read of the disk, at most two.

    record   weight [D], then state [S], as `row_state` has them

The file is sparse and has no name (see `node_memory`).
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engram_kernels.copy_rows import copy_rows
from engram_kernels.read_ahead import read_ahead
from engram_kernels.row_state import RowState
from engram_megatron.config_tables import record_bytes
from engram_megatron.errors import UsageError
from engram_megatron.tables.host_memory import GIB, scattered_bytes
from engram_megatron.tables.node_memory import MemoryHandle, NodeMemory
from engram_megatron.tables.row_store import Int64, RowFormat


@dataclass(frozen=True)
class FileHandle:
    """Names a `RowFile` to other processes of the node."""

    format: RowFormat
    num_rows: int
    file: MemoryHandle

    def open(self) -> RowFile:
        return RowFile(self.format, self.num_rows, NodeMemory.open(self.file))


class RowFile:
    """Weights and states of `num_rows` rows, zero where never written; without their last steps."""

    def __init__(self, row_format: RowFormat, num_rows: int, memory: NodeMemory) -> None:
        self.handle = FileHandle(row_format, num_rows, memory.handle)
        self.memory = memory
        self._record_bytes = record_bytes(row_format.row_dim, row_format.dtype)
        self._is_reserved = False
        records = memory.array((num_rows, self._record_bytes), np.uint8)
        split = row_format.row_dim * row_format.stored.itemsize
        self._planes = records[:, :split].view(row_format.stored), records[:, split:].view(row_format.wide)

    @classmethod
    def create(cls, folder: Path, num_rows: int, row_format: RowFormat) -> RowFile:
        size = num_rows * record_bytes(row_format.row_dim, row_format.dtype)
        return cls(row_format, num_rows, NodeMemory.create_file(folder, size))

    def reserve(self) -> None:
        """Take disk space for all rows. Raises `UsageError` where there is too little."""
        try:
            self.memory.commit()
        except OSError as error:
            raise UsageError(
                f"tables.nvme_dir has no room for {self.memory.handle.num_bytes / GIB:.2f} GiB of tables of this rank "
                f"({error.strerror}); make room, use more hosts, or set tables.commit=lazy"
            ) from error
        self._is_reserved = True

    def load(self, rows: Int64, table: RowState, places: Int64) -> None:
        """Copy weights and states of `rows` to `places` of `table`."""
        self.read_ahead(rows)
        copy_rows(self._planes, rows, (table.weight, table.state), places)

    def save(self, table: RowState, places: Int64, rows: Int64) -> None:
        """Copy weights and states at `places` of `table` to `rows`. Raises `OSError` for a full disk."""
        self._check_room(rows.size)
        self.read_ahead(rows)  # a page is read before a part of it is written
        copy_rows((table.weight, table.state), places, self._planes, rows)

    def read_ahead(self, rows: Int64) -> None:
        """Ask the disk for the pages of `rows`, without waiting for them."""
        read_ahead(self.memory.descriptor, rows, self._record_bytes)

    def _check_room(self, num_rows: int) -> None:
        """A page of a mapped file for which the disk has no room would end the process without a word."""
        if self._is_reserved or num_rows == 0:
            return
        unwritten = self.memory.handle.num_bytes - self.memory.resident_bytes()
        needed = min(unwritten, scattered_bytes(num_rows, self.handle.num_rows, self._record_bytes))
        status = os.fstatvfs(self.memory.descriptor)
        free = status.f_bavail * status.f_frsize
        if needed > free:
            raise OSError(
                errno.ENOSPC,
                f"the disk of tables.nvme_dir is full: {num_rows} rows of the tables need up to {needed / GIB:.3f} GiB "
                f"there, {free / GIB:.3f} GiB are free; make room and continue with --resume",
            )
