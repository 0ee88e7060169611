"""Writing tables block by block (see `table_format`)."""

from __future__ import annotations

import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram_checkpoints.checkpoint_files import FileSum, FileSums
from engram_checkpoints.table_chunks import checksum, encode
from engram_checkpoints.table_format import LAST_STEP, WEIGHT, TableDescription, chunk_file
from engram_kernels.row_state import RowState

_THREADS = 2  # one encodes while the other writes
_CHUNKS_AHEAD = 6  # in memory beside those of the block that is given


class TableWriter:
    """Writes blocks of rows into the group that `create` made, or into folders of the same names that are to be put
    with it. Ranks may write at the same time.

    A context: what was given is written when it ends.
    """

    def __init__(self, path: Path, description: TableDescription, sums: FileSums) -> None:
        self.description = description
        self._path, self._sums = path, sums
        for name in (LAST_STEP, WEIGHT, *description.moments):  # they are `create`'s, but on the disk of another node
            (path / name).mkdir(parents=True, exist_ok=True)
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="table_writer")
        self._pending: deque[Future[None]] = deque()

    def __enter__(self) -> TableWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._wait(0)
        finally:
            self._pool.shutdown(cancel_futures=True)

    def write_last_step(self, first_row: int, last_step: NDArray[np.int32]) -> bool:
        """Write the last steps of a whole block, which must not change before the context ends; says whether the
        block's rows must be written too."""
        self._submit(LAST_STEP, first_row, last_step, compress=True)
        return bool(self.description.is_stored(last_step).any())

    def write_rows(self, first_row: int, rows: RowState) -> None:
        """Write a whole block: `rows` as `RowState.exact` gives them, which become the writer's. Returns before all is
        written.

        Raises `OSError` where the disk does not take this block or an earlier one.
        """
        left_out = ~self.description.is_stored(rows.last_step)
        if left_out.any():
            rows.weight[left_out] = 0
            rows.state[left_out] = 0
        # Of numbers without zeros LZ4 takes nothing off.
        compress = bool(left_out.any() or not rows.last_step.all())
        self._submit(WEIGHT, first_row, rows.weight, compress=compress)
        for name, moment in zip(self.description.moments, np.hsplit(rows.state, rows.moments), strict=True):
            self._submit(name, first_row, moment, compress=compress)
        self._wait(_CHUNKS_AHEAD)

    def _submit(self, name: str, first_row: int, values: NDArray[Any], *, compress: bool) -> None:
        description = self.description
        number, rest = divmod(first_row, description.block_rows)
        assert rest == 0, (first_row, description.block_rows)
        assert len(values) == min(description.block_rows, description.total_rows - first_row), (name, first_row)
        self._pending.append(self._pool.submit(self._write, chunk_file(name, number), values, compress))

    def _write(self, file: str, values: NDArray[Any], compress: bool) -> None:
        missing = self.description.block_rows - len(values)
        if missing:  # zarr's chunks are all of one size
            values = np.concatenate([values, np.zeros((missing, *values.shape[1:]), values.dtype)])
        parts = encode(np.ascontiguousarray(values), compress=compress)
        path = self._path / file
        with path.open("xb", buffering=0) as stream:
            for part in parts:
                written = 0
                while written < len(part):  # a raw file may take a part only
                    written += stream.write(memoryview(part)[written:])
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # Linux begins to write it to the disk now
        self._sums.add(path, FileSum(sum(len(part) for part in parts), checksum(parts)))

    def _wait(self, most: int) -> None:
        """Until at most `most` chunks are not written. Raises what went wrong with one."""
        while len(self._pending) > most:
            self._pending.popleft().result()
