"""Writing tables block by block (see `table_format`)."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import google_crc32c
import numpy as np
from numcodecs import Blosc
from numpy.typing import NDArray

from engram_checkpoints.checkpoint_files import FileSum, FileSums
from engram_checkpoints.table_format import LAST_STEP, WEIGHT, TableDescription, chunk_file
from engram_kernels.row_state import RowState

_THREADS = 2  # one encodes while the other writes
_CHUNKS_AHEAD = 6  # in memory beside those of the block that is given


class TableWriter:
    """Writes blocks of rows into the group that `create` made. Ranks may write at the same time.

    A context: what was given is written when it ends. Chunks are as zarr makes them, and zarr reads them. A chunk is
    always written whole and by one writer, so zarr's way of writing parts of arrays, in one thread and with three more
    copies, has nothing to add.
    """

    def __init__(self, path: Path, description: TableDescription, sums: FileSums) -> None:
        self.description = description
        self._path, self._sums = path, sums
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
        self._submit(LAST_STEP, first_row, last_step)
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
        self._submit(WEIGHT, first_row, rows.weight)
        for name, moment in zip(self.description.moments, np.hsplit(rows.state, rows.moments), strict=True):
            self._submit(name, first_row, moment)
        self._wait(_CHUNKS_AHEAD)

    def _submit(self, name: str, first_row: int, values: NDArray[Any]) -> None:
        description = self.description
        number, rest = divmod(first_row, description.block_rows)
        assert rest == 0, (first_row, description.block_rows)
        assert len(values) == min(description.block_rows, description.total_rows - first_row), (name, first_row)
        self._pending.append(self._pool.submit(self._write, chunk_file(name, number), values))

    def _write(self, file: str, values: NDArray[Any]) -> None:
        missing = self.description.block_rows - len(values)
        if missing:  # zarr's chunks are all of one size
            values = np.concatenate([values, np.zeros((missing, *values.shape[1:]), values.dtype)])
        content, check = encode(np.ascontiguousarray(values))
        path = self._path / file
        with path.open("xb", buffering=0) as stream:
            for part in (content, check):
                written = 0
                while written < len(part):  # a raw file may take a part only
                    written += stream.write(memoryview(part)[written:])
        crc32c = google_crc32c.extend(int.from_bytes(check, "little"), check)
        self._sums.add(path, FileSum(len(content) + len(check), crc32c))

    def _wait(self, most: int) -> None:
        """Until at most `most` chunks are not written. Raises what went wrong with one."""
        while len(self._pending) > most:
            self._pending.popleft().result()


def encode(values: NDArray[Any]) -> tuple[bytes, bytes]:
    """A chunk as the codecs of the arrays make it: little-endian numbers, LZ4 in Blosc, and behind them the CRC-32C."""
    content = Blosc("lz4", clevel=1, shuffle=Blosc.NOSHUFFLE, typesize=values.dtype.itemsize).encode(values)
    return content, int(google_crc32c.value(content)).to_bytes(4, "little")
