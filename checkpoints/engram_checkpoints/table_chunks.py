"""One chunk of an array of tables: little-endian numbers in a Blosc frame, and the frame's CRC-32C behind it, as zarr's
codecs `bytes`, `blosc` (LZ4, no shuffle) and `crc32c` make it.

zarr reads these chunks and writes such; made here they cost fewer copies and use the caller's thread, so that several
threads make several at a time.
"""

from __future__ import annotations

import struct
from typing import Any

import google_crc32c
import numpy as np
from numcodecs import Blosc, blosc
from numpy.typing import NDArray

# Blosc 1's frame: version, LZ4's format, flags, size of a number, sizes of content, block and frame
_HEADER = struct.Struct("<BBBBIII")
_VERSION, _LZ4_FORMAT, _AS_IT_IS, _LZ4, _BLOCK_BYTES = 2, 1, 0x02, 0x20, 65536
_CRC_BYTES = 4


def encode(values: NDArray[Any], *, compress: bool) -> list[Any]:
    """The parts of a chunk, one behind the other, for contiguous `values`. Without `compress` they stand in it as they
    are, and are not copied."""
    assert values.flags.c_contiguous
    if compress:
        frame = [Blosc("lz4", clevel=1, shuffle=Blosc.NOSHUFFLE, typesize=values.dtype.itemsize).encode(values)]
    else:
        size = values.nbytes
        flags, block = _AS_IT_IS | _LZ4, min(size, _BLOCK_BYTES)
        header = _HEADER.pack(_VERSION, _LZ4_FORMAT, flags, values.dtype.itemsize, size, block, size + _HEADER.size)
        frame = [header, values.reshape(-1).view(np.uint8)]
    return [*frame, checksum(frame).to_bytes(_CRC_BYTES, "little")]


def decode(chunk: bytes, out: NDArray[Any]) -> None:
    """Fill contiguous `out`. Raises `ValueError` for a chunk that is damaged or of another size."""
    assert out.flags.c_contiguous
    frame = memoryview(chunk)[:-_CRC_BYTES]
    if len(chunk) <= _HEADER.size + _CRC_BYTES:
        raise ValueError(f"it has {len(chunk)} bytes")
    found, told = checksum([frame]), int.from_bytes(chunk[-_CRC_BYTES:], "little")
    if found != told:
        raise ValueError(f"its CRC-32C is {found:08x}, not {told:08x}")
    size = _HEADER.unpack_from(frame)[4]
    if size != out.nbytes:
        raise ValueError(f"it holds {size} bytes of numbers, not {out.nbytes}")
    blosc.decompress(frame, out)


def checksum(parts: list[Any]) -> int:
    """CRC-32C of `parts`, one behind the other."""
    crc = 0
    for part in parts:
        crc = google_crc32c.extend(crc, np.frombuffer(part, np.uint8))
    return int(crc)
