"""Reading tables from disk, whatever ranks wrote them (see `table_format`), a block or less at a time."""

from __future__ import annotations

import contextlib
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from engram_checkpoints.checkpoint_files import COMPLETE, MANIFEST, sum_of
from engram_checkpoints.table_format import (
    LAST_STEP,
    LEARNING_RATES,
    WEIGHT,
    Base,
    TableDescription,
    chunk_file,
    whole_chunks,
)
from engram_kernels.catch_up import CatchUp
from engram_kernels.row_adam import read_rows
from engram_kernels.row_state import RowState, empty_rows
from engram_megatron.errors import UsageError
from engram_megatron.tables.row_init import initial_rows


class TableReader:
    """The tables at `path`, a `tables.zarr` in a checkpoint's folder. Holds one block in memory at a time.

    Every method raises `UsageError` for a chunk that is missing or damaged, which it names.
    """

    def __init__(self, path: Path) -> None:
        """Raises `UsageError` where there are no tables, or the base of a delta is not there or another."""
        self.path = path
        try:
            group = zarr.open_group(path, mode="r")
            attributes = dict(group.attrs)
            base: Any = attributes.pop("base")
            self.description = TableDescription(**attributes, base=None if base is None else Base(**base))
            with whole_chunks():
                self._arrays: dict[str, Any] = {
                    name: group[name] for name in (WEIGHT, *self.description.moments, LAST_STEP, LEARNING_RATES)
                }
        except (FileNotFoundError, KeyError, TypeError, ValueError) as error:
            raise UsageError(f"{path} holds no tables of a finished save: {error}") from error
        self._base = None if self.description.base is None else self._open_base(self.description.base)
        self._read_block = lru_cache(maxsize=1)(self._read_whole_block)

    def _open_base(self, base: Base) -> TableReader:
        folder = self.path.parent.parent / base.checkpoint
        if not (folder / COMPLETE).is_file():
            raise UsageError(f"{self.path} is a delta of {folder}, which is not there; restore it, or use another save")
        if sum_of(folder / MANIFEST).crc32c != base.manifest_crc32c:
            raise UsageError(f"{self.path} is a delta of another checkpoint than {folder}; use another save")
        return TableReader(folder / self.path.name)

    @property
    def wide(self) -> np.dtype[Any]:
        """Of weights and moments."""
        return np.dtype(self.description.dtype)

    @property
    def num_blocks(self) -> int:
        return -(-self.description.total_rows // self.description.block_rows)

    def block(self, number: int) -> tuple[int, int]:
        """First row of a stored block, and the row behind its last."""
        start = number * self.description.block_rows
        return start, min(start + self.description.block_rows, self.description.total_rows)

    def pieces(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Rows start .. stop - 1, cut where one stored block ends and the next begins."""
        size = self.description.block_rows
        borders = range(start // size * size, stop, size)
        return [(max(first, start), min(first + size, stop)) for first in borders]

    def read_ahead(self, start: int, stop: int) -> None:
        """Say that rows start .. stop - 1 will be read soon."""
        for first, _ in self.pieces(start, stop):
            for name in (LAST_STEP, WEIGHT, *self.description.moments):
                path = self.path / chunk_file(name, first // self.description.block_rows)
                with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
        if self._base is not None:
            self._base.read_ahead(start, stop)

    def last_step(self, start: int, stop: int) -> NDArray[np.int32]:
        """Of rows start .. stop - 1."""
        size = self.description.block_rows
        parts = []
        for first, end in self.pieces(start, stop):
            chunk = self._chunk(LAST_STEP, first // size)
            parts.append(chunk[first % size : first % size + end - first])
        return np.concatenate(parts)

    def rows(self, start: int, stop: int) -> RowState:
        """A copy of rows start .. stop - 1 as of each one's last step: those that are left out are made or taken from
        the base."""
        size = self.description.block_rows
        out = empty_rows(stop - start, self.description.row_dim, self.wide, self.description.num_moments)
        for first, end in self.pieces(start, stop):
            block = self._read_block(first // size)
            span, place = slice(first % size, first % size + end - first), slice(first - start, end - start)
            out.weight[place], out.state[place] = block.weight[span], block.state[span]
            out.last_step[place] = block.last_step[span]
        return out

    def weights(self, start: int, stop: int, catch_up: CatchUp | None) -> NDArray[Any]:
        """Weights [stop - start, row_dim], exact, as of the last step; `catch_up` as of `catch_up()`."""
        rows = self.rows(start, stop)
        if catch_up is None:
            return rows.weight
        values = np.empty_like(rows.weight)
        read_rows(rows, np.arange(rows.num_rows), values, catch_up)
        return values

    def catch_up(self) -> CatchUp | None:
        """What rows have missed since their last step; None where they have missed nothing."""
        constants = self.description.catch_up
        if constants is None:
            return None
        catch_up = CatchUp(constants["beta1"], constants["beta2"], constants["eps"])
        catch_up.replay(self.learning_rates())
        return catch_up

    def learning_rates(self) -> NDArray[np.float64]:
        """Of all steps so far."""
        return self._chunk(LEARNING_RATES, 0) if self.description.step_count else np.empty(0)

    def _read_whole_block(self, number: int) -> RowState:
        start, stop = self.block(number)
        description, last_step = self.description, self._chunk(LAST_STEP, number)
        stored = description.is_stored(last_step)
        rows = empty_rows(stop - start, description.row_dim, self.wide, description.num_moments)
        rows.last_step[:] = last_step
        if stored.any():
            rows.weight[:] = self._chunk(WEIGHT, number)
            for moment, name in zip(np.hsplit(rows.state, rows.moments), description.moments, strict=True):
                moment[:] = self._chunk(name, number)
        self._fill(rows, start, np.flatnonzero(~stored))
        return rows

    def _fill(self, rows: RowState, first_row: int, left_out: NDArray[np.int64]) -> None:
        """Complete a block with its rows that are left out."""
        if not left_out.size:
            return
        if self._base is not None:
            base = self._base.rows(first_row, first_row + rows.num_rows)
            rows.set_exact(left_out, base.exact(left_out))
            return
        initial = self.description.initial
        assert initial is not None
        row_dim, seed, std = self.description.row_dim, initial["seed"], initial["std"]
        rows.weight[left_out] = initial_rows(left_out + first_row, row_dim, self.wide, seed, std)
        rows.state[left_out] = 0

    def _chunk(self, name: str, number: int) -> Any:
        """Array `name`'s part of a stored block."""
        array = self._arrays[name]
        size = array.chunks[0]
        chunk = chunk_file(name, number)
        start, stop = number * size, min((number + 1) * size, array.shape[0])
        where = f"{self.path}: chunk {chunk} ({'steps' if name == LEARNING_RATES else 'rows'} {start}..{stop - 1})"
        if not (self.path / chunk).is_file():
            raise UsageError(f"{where} is missing; use another save")
        try:
            return np.asarray(array[start:stop])
        except Exception as error:  # each codec has its own class for bytes that it cannot decode
            raise UsageError(f"{where} is damaged ({error}); use another save") from error
