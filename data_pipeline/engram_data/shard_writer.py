"""A one-dimensional sharded zarr array, written from start to end with one chunk in memory.

zarr-python writes a shard only as a whole (256 MB of tokens at once), or rewrites it for every chunk. So the shard
files are laid out here, as the specification says (zarr v3 "sharding_indexed", index at the end): the encoded chunks
one after another, then the index uint64 [chunks per shard, 2] of offset and bytes, then the crc32c of the index.
"""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import zarr
from numcodecs.zstd import compress  # type: ignore[import-untyped]
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec, ZstdCodec

from engram_data.corpus_format import ArraySizes, ShardRecord, shards_to_json

ZSTD_LEVEL = 3
MISSING = np.uint64(2**64 - 1)  # offset and size of a chunk that a shard does not hold


def _with_crc32c(data: bytes) -> bytes:
    return data + int(google_crc32c.value(data)).to_bytes(4, "little")


def shard_path(group_path: Path, name: str, shard: int) -> Path:
    """The file of shard number `shard` of array `name`."""
    return group_path / name / "c" / str(shard)


def write_array_metadata(
    group_path: Path, name: str, dtype: np.dtype[Any], length: int, sizes: ArraySizes, records: list[ShardRecord]
) -> None:
    """Make the array `name` [length] of the zarr group at `group_path`, whose shard files `records` are written."""
    zarr.open_group(group_path, mode="r+").create_array(
        name,
        shape=(length,),
        dtype=dtype.newbyteorder("<"),
        chunks=(sizes.chunk,),
        shards=(sizes.shard,),
        compressors=[ZstdCodec(level=ZSTD_LEVEL), Crc32cCodec()],
        fill_value=0,
        attributes={"shards": shards_to_json(records)},
    )


class ShardFile:
    """Appends up to `sizes.shard` elements to the new file `path`, which is on the disk when `close` returns."""

    def __init__(self, path: Path, dtype: np.dtype[Any], sizes: ArraySizes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("xb")
        self.room = sizes.shard  # elements that it still takes
        self._chunk = np.zeros(sizes.chunk, dtype.newbyteorder("<"))
        self._filled = 0
        self._index = np.full((sizes.shard // sizes.chunk, 2), MISSING, "<u8")
        self._num_chunks = 0
        self._content = hashlib.sha256()

    def append(self, values: NDArray[Any]) -> None:
        """Add `values` [n]. Raises OSError where the disk does not take them."""
        assert len(values) <= self.room, (len(values), self.room)
        self.room -= len(values)
        start = 0
        while start < len(values):
            count = min(len(values) - start, len(self._chunk) - self._filled)
            self._chunk[self._filled : self._filled + count] = values[start : start + count]
            self._filled += count
            start += count
            if self._filled == len(self._chunk):
                self._write_chunk()

    def close(self) -> ShardRecord:
        """Write what is left, and the index."""
        if self._filled:
            self._write_chunk()
        self._file.write(_with_crc32c(self._index.tobytes()))
        num_bytes = self._file.tell()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return ShardRecord(num_bytes, self._content.hexdigest())

    def abandon(self) -> None:
        """Close the file."""
        with suppress(OSError):  # closing writes what is buffered, and fails again on a full disk
            self._file.close()

    def _write_chunk(self) -> None:
        self._content.update(self._chunk[: self._filled].tobytes())
        self._chunk[self._filled :] = 0  # zarr stores every chunk at full length
        data = _with_crc32c(compress(self._chunk, ZSTD_LEVEL))
        self._index[self._num_chunks] = self._file.tell(), len(data)
        self._file.write(data)
        self._num_chunks += 1
        self._filled = 0


class ShardedArrayWriter:
    """Appends elements to array `name` of the zarr group at `group_path`, which must exist when `close` is called.

    The array exists for readers once `close` has written its metadata.
    """

    def __init__(self, group_path: Path, name: str, dtype: np.dtype[Any], sizes: ArraySizes) -> None:
        self.length = 0
        self._group_path, self._name, self._dtype, self._sizes = group_path, name, dtype, sizes
        self._records: list[ShardRecord] = []
        self._shard: ShardFile | None = None

    def append(self, values: NDArray[Any]) -> None:
        """Add `values` [n] at the end. Raises OSError where the disk does not take them."""
        start = 0
        while start < len(values):
            if self._shard is None:
                path = shard_path(self._group_path, self._name, len(self._records))
                self._shard = ShardFile(path, self._dtype, self._sizes)
            count = min(len(values) - start, self._shard.room)
            self._shard.append(values[start : start + count])
            start += count
            if not self._shard.room:
                self._close_shard()
        self.length += len(values)

    def close(self) -> list[ShardRecord]:
        """Write what is left and the array's metadata; returns one record per shard file."""
        self._close_shard()
        write_array_metadata(self._group_path, self._name, self._dtype, self.length, self._sizes, self._records)
        return self._records

    def abandon(self) -> None:
        """Close the open file, if any; nothing more is written."""
        if self._shard is not None:
            self._shard.abandon()

    def _close_shard(self) -> None:
        if self._shard is not None:
            self._records.append(self._shard.close())
            self._shard = None
