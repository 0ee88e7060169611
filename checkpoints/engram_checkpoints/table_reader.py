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

from engram_checkpoints import table_chunks
from engram_checkpoints.checkpoint_files import COMPLETE, MANIFEST, sum_of
from engram_checkpoints.table_format import (
    LAST_STEP,
    LEARNING_RATES,
    WEIGHT,
    Base,
    TableDescription,
    chunk_file,
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
        except (FileNotFoundError, KeyError, TypeError, ValueError) as error:
            raise UsageError(f"{path} holds no tables of a finished save: {error}") from error
        self._base = None if self.description.base is None else self._open_base(self.description.base)
        self._kept_block = lru_cache(maxsize=2)(self._whole_block)

    def _open_base(self, base: Base) -> TableReader:
        folder = self.path.parent.parent / base.checkpoint
        if not (folder / COMPLETE).is_file():
            raise UsageError(f"{self.path} is a delta of {folder}, which is not there; restore it, or use another save")
        if sum_of(folder / MANIFEST).crc32c != base.manifest_crc32c:
            raise UsageError(f"{self.path} is a delta of another checkpoint than {folder}; use another save")
        return TableReader(folder / self.path.name)

    @property
    def base_folder(self) -> Path | None:
        """The checkpoint that a delta is relative to."""
        return None if self._base is None else self._base.path.parent

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
            chunk = self._last_steps(first // size)
            parts.append(chunk[first % size : first % size + end - first])
        return np.concatenate(parts)

    def rows(self, start: int, stop: int) -> RowState:
        """A copy of rows start .. stop - 1 as of each one's last step: those that are left out are made or taken from
        the base."""
        size = self.description.block_rows
        if (start, stop) == self.block(start // size):
            return self._whole_block(start // size)
        out = self._empty(stop - start)
        for first, end in self.pieces(start, stop):
            block = self._kept_block(first // size)
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
        rates = np.empty(self.description.step_count)
        if rates.size:
            self._read(LEARNING_RATES, 0, (0, rates.size), rates)
        return rates

    def _whole_block(self, number: int) -> RowState:
        start, stop = self.block(number)
        rows = self._empty(stop - start)
        rows.last_step[:] = self._last_steps(number)
        stored = self.description.is_stored(rows.last_step)
        if stored.any():
            self._read_rows(WEIGHT, number, rows.weight)
            for moment, name in zip(np.hsplit(rows.state, rows.moments), self.description.moments, strict=True):
                self._read_rows(name, number, moment)
        self._fill(rows, start, np.flatnonzero(~stored))
        return rows

    def _empty(self, num_rows: int) -> RowState:
        return empty_rows(num_rows, self.description.row_dim, self.wide, self.description.num_moments)

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

    def _last_steps(self, number: int) -> NDArray[np.int32]:
        """Of a stored block."""
        start, stop = self.block(number)
        out = np.empty(self.description.block_rows, np.int32)
        self._read(LAST_STEP, number, (start, stop), out)
        return out[: stop - start]

    def _read_rows(self, name: str, number: int, out: NDArray[Any]) -> None:
        """Array `name`'s rows of a stored block into `out`."""
        block_rows = self.description.block_rows
        is_direct = out.flags.c_contiguous and len(out) == block_rows
        chunk = out if is_direct else np.empty((block_rows, self.description.row_dim), self.wide)
        self._read(name, number, self.block(number), chunk)
        if not is_direct:
            out[:] = chunk[: len(out)]

    def _read(self, name: str, number: int, span: tuple[int, int], out: NDArray[Any]) -> None:
        """A whole chunk of array `name` into `out`."""
        file = chunk_file(name, number)
        kind = "steps" if name == LEARNING_RATES else "rows"
        where = f"{self.path}: chunk {file} ({kind} {span[0]}..{span[1] - 1})"
        try:
            table_chunks.read(self.path / file, out)
        except FileNotFoundError as error:
            raise UsageError(f"{where} is missing; use another save") from error
        except (OSError, ValueError, RuntimeError) as error:
            raise UsageError(f"{where} is damaged ({error}); use another save") from error
