"""Hot rows in memory, all others in a file on a local disk: the numbers are those of `HostRows` to the bit.

Hashing spreads the hot rows over all pages, so the kernel's page cache alone would hold little else than their cold
neighbours. Therefore rows, not pages, are kept in memory: in a table of hot rows, whose places `HotPlaces` gives to the
rows that have gradients. An update brings its rows in, and those that make room for them go to the file. Reads take a
row from where it lies and move nothing. A row that never had a gradient lies nowhere.

In memory of every row: its last step, its place among the hot ones, and how often it was used.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram_kernels.catch_up import CatchUp
from engram_kernels.copy_rows import copy_rows
from engram_kernels.gather_rows import check_rows
from engram_kernels.hot_places import HotPlaces
from engram_kernels.row_state import RowState
from engram_megatron.tables.node_memory import ArraySpec, HugePages, MemoryHandle, NodeMemory, bytes_of_arrays
from engram_megatron.tables.row_file import FileHandle, RowFile
from engram_megatron.tables.row_store import Int64, RowFormat, RowPart, read_weights

ROWS_AT_ONCE = 16384  # copied out of the file


@dataclass(frozen=True)
class NvmeHandle:
    """Names `NvmeRows` to other processes of the node."""

    format: RowFormat
    num_rows: int
    num_hot: int
    memory: MemoryHandle
    file: FileHandle

    def open(self) -> NvmeRows:
        memory, file = NodeMemory.open(self.memory), self.file.open()
        return NvmeRows(self.format, self.num_rows, self.num_hot, memory, file)


class NvmeRows:
    """`num_hot` of `num_rows` rows in `memory`, the others in `file`."""

    is_sparse = True

    def __init__(self, row_format: RowFormat, num_rows: int, num_hot: int, memory: NodeMemory, file: RowFile) -> None:
        self.format = row_format
        self.memory = memory
        self.file = file
        *hot, self.last_step, self.place_of, past_uses, row_at, uses = memory.arrays(
            _specs(row_format, num_rows, num_hot)
        )
        self._hot = RowState(*hot)
        self._places = HotPlaces(self.place_of, past_uses, row_at, uses)
        self._moves = threading.Lock()  # held while rows come in and others go out, for copies beside an update

    @classmethod
    def create(
        cls, folder: Path, row_format: RowFormat, num_rows: int, num_hot: int, huge_pages: HugePages
    ) -> NvmeRows:
        memory = NodeMemory.create(bytes_of_arrays(_specs(row_format, num_rows, num_hot)), huge_pages)
        return cls(row_format, num_rows, num_hot, memory, RowFile.create(folder, num_rows, row_format))

    @property
    def handle(self) -> NvmeHandle:
        num_rows, num_hot = self.last_step.size, self._hot.num_rows
        return NvmeHandle(self.format, num_rows, num_hot, self.memory.handle, self.file.handle)

    def commit(self) -> None:
        self.memory.commit()
        self.file.reserve()

    def read(self, rows: Int64, catch_up: CatchUp | None, out: NDArray[Any], places: Int64 | None) -> None:
        hot_at, hot, cold_at = self._divided(rows)
        places = np.arange(rows.size) if places is None else places
        read_weights(self._hot, hot, catch_up, out, places[hot_at])
        for start in range(0, cold_at.size, ROWS_AT_ONCE):
            at = cold_at[start : start + ROWS_AT_ONCE]
            read_weights(self._copy(rows[at]), np.arange(at.size), catch_up, out, places[at])

    def exact(self, rows: Int64) -> RowState:
        return self._copy(rows).exact()

    def copy_to(self, rows: Int64, target: RowState, places: Int64) -> None:
        with self._moves:
            hot_at, hot, cold_at = self._divided(rows)
            copy_rows((self._hot.weight, self._hot.state), hot, (target.weight, target.state), places[hot_at])
            self.file.load(rows[cold_at], target, places[cold_at])
            target.last_step[places] = self.last_step[rows]

    def write(self, rows: Int64, values: RowState) -> None:
        copy = self.format.empty(rows.size)
        copy.set_exact(slice(None), values)
        self._store(rows, copy)

    def updating(self, rows: Int64, is_new: NDArray[np.bool_]) -> Iterator[RowPart]:
        check_rows(rows, self.last_step.size)
        for start in range(0, rows.size, max(1, self._hot.num_rows)):
            part = slice(start, start + self._hot.num_rows)
            places = self._bring_in(rows[part], is_new[part])
            order = np.argsort(places)
            yield RowPart(start + order, self._hot, places[order])
            self.last_step[rows[part]] = self._hot.last_step[places]

    def sweeping(self, rows: Int64, is_new: NDArray[np.bool_]) -> Iterator[RowPart]:
        check_rows(rows, self.last_step.size)
        for start in range(0, self.last_step.size, ROWS_AT_ONCE):
            moves = self.last_step[start : start + ROWS_AT_ONCE] > 0
            first, last = np.searchsorted(rows, (start, start + moves.size))
            for piece in range(first, last, self._hot.num_rows):  # so that rows become hot as in other updates
                part = slice(piece, min(piece + self._hot.num_rows, last))
                self._bring_in(rows[part], is_new[part])
            moves[rows[first:last] - start] = True
            moving = start + np.flatnonzero(moves)
            copy = self._copy(moving)
            yield RowPart(slice(first, last), copy, np.searchsorted(moving, rows[first:last]))
            self._store(moving, copy)

    def read_ahead(self, rows: Int64) -> None:
        cold = self.place_of[rows] == 0
        self.file.read_ahead(rows[cold & (self.last_step[rows] > 0)])

    def _bring_in(self, rows: Int64, is_new: NDArray[np.bool_]) -> Int64:
        """The places of `rows` among the hot ones, which they have when this returns."""
        with self._moves:
            admitted = self._places.admit(rows)
            makes_room = admitted.left >= 0
            self.file.save(self._hot, admitted.places[makes_room], admitted.left[makes_room])
            from_file = admitted.is_new & ~is_new
            self.file.load(rows[from_file], self._hot, admitted.places[from_file])
            self._hot.state[admitted.places[is_new]] = 0
            self._hot.last_step[admitted.places] = self.last_step[rows]
            return admitted.places

    def _copy(self, rows: Int64) -> RowState:
        """A copy of `rows` as they are stored."""
        copy = self.format.empty(rows.size)
        self.copy_to(rows, copy, np.arange(rows.size))
        return copy

    def _store(self, rows: Int64, copy: RowState) -> None:
        """Put `copy` where `rows` lie."""
        hot_at, hot, cold_at = self._divided(rows)
        copy_rows((copy.weight, copy.state), hot_at, (self._hot.weight, self._hot.state), hot)
        self._hot.last_step[hot] = copy.last_step[hot_at]
        self.file.save(copy, cold_at, rows[cold_at])
        self.last_step[rows] = copy.last_step

    def _divided(self, rows: Int64) -> tuple[Int64, Int64, Int64]:
        """Which of `rows` are hot, and their places; which are not. Raises `IndexError` for a row outside the shard."""
        check_rows(rows, self.last_step.size)
        places = self.place_of[rows]
        hot_at = np.flatnonzero(places)
        return hot_at, places[hot_at].astype(np.int64) - 1, np.flatnonzero(places == 0)


def _specs(row_format: RowFormat, num_rows: int, num_hot: int) -> list[ArraySpec]:
    """The arrays in memory: the hot rows; the last step of every row; what `HotPlaces` keeps."""
    of_rows = [((num_rows,), np.dtype(kind)) for kind in (np.int32, np.int32, np.uint8)]
    of_places = [((num_hot,), np.dtype(kind)) for kind in (np.int64, np.uint8)]
    return [*row_format.specs(num_hot), *of_rows, *of_places]
