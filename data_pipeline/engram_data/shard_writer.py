"""A one-dimensional sharded zarr array, written from start to end with one chunk in memory.

zarr-python writes a shard only as a whole (256 MB of tokens at once), or rewrites it for every chunk. So the shard
files are laid out here, as the specification says (zarr v3 "sharding_indexed", index at the end): the encoded chunks
one after another, then the index uint64 [chunks per shard, 2] of offset and bytes, then the crc32c of the index.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, BinaryIO

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


class ShardedArrayWriter:
    """Appends elements to array `name` of the zarr group at `group_path`, which must exist when `close` is called.

    The array exists for readers once `close` has written its metadata.
    """

    def __init__(self, group_path: Path, name: str, dtype: np.dtype[Any], sizes: ArraySizes) -> None:
        self.length = 0
        self._group_path, self._name, self._sizes = group_path, name, sizes
        self._chunk = np.zeros(sizes.chunk, dtype.newbyteorder("<"))
        self._filled = 0
        self._records: list[ShardRecord] = []
        self._file: BinaryIO | None = None
        self._index = np.full((sizes.shard // sizes.chunk, 2), MISSING, "<u8")
        self._chunks_in_shard = 0
        self._content = hashlib.sha256()

    def append(self, values: NDArray[Any]) -> None:
        """Add `values` [n] at the end. Raises OSError where the disk does not take them."""
        start = 0
        while start < len(values):
            count = min(len(values) - start, self._sizes.chunk - self._filled)
            self._chunk[self._filled : self._filled + count] = values[start : start + count]
            self._filled += count
            start += count
            if self._filled == self._sizes.chunk:
                self._write_chunk()
        self.length += len(values)

    def close(self) -> list[ShardRecord]:
        """Write what is left and the array's metadata; returns one record per shard file."""
        if self._filled:
            self._write_chunk()
        if self._file is not None:
            self._close_shard()
        zarr.open_group(self._group_path, mode="r+").create_array(
            self._name,
            shape=(self.length,),
            dtype=self._chunk.dtype,
            chunks=(self._sizes.chunk,),
            shards=(self._sizes.shard,),
            compressors=[ZstdCodec(level=ZSTD_LEVEL), Crc32cCodec()],
            fill_value=0,
            attributes={"shards": shards_to_json(self._records)},
        )
        return self._records

    def abandon(self) -> None:
        """Close the open file, if any; nothing more is written."""
        if self._file is not None:
            self._file.close()

    def _write_chunk(self) -> None:
        self._content.update(self._chunk[: self._filled].tobytes())
        self._chunk[self._filled :] = 0  # zarr stores every chunk at full length
        data = _with_crc32c(compress(self._chunk, ZSTD_LEVEL))
        if self._file is None:
            path = self._group_path / self._name / "c" / str(len(self._records))
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("xb")
        self._index[self._chunks_in_shard] = self._file.tell(), len(data)
        self._file.write(data)
        self._chunks_in_shard += 1
        self._filled = 0
        if self._chunks_in_shard == len(self._index):
            self._close_shard()

    def _close_shard(self) -> None:
        assert self._file is not None
        self._file.write(_with_crc32c(self._index.tobytes()))
        num_bytes = self._file.tell()
        self._file.close()
        self._file = None
        self._records.append(ShardRecord(num_bytes, self._content.hexdigest()))
        self._content = hashlib.sha256()
        self._index[:] = MISSING
        self._chunks_in_shard = 0
