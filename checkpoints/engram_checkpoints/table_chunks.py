"""One chunk of an array of tables: little-endian numbers in a Blosc frame, and the frame's CRC-32C behind it, as zarr's
codecs `bytes`, `blosc` (LZ4, no shuffle) and `crc32c` make it.

zarr reads these chunks and writes such; made here they cost fewer copies and use the caller's thread, so that several
threads make several at a time.
"""

from __future__ import annotations

import struct
from pathlib import Path
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
    _compare(checksum([frame]), chunk[-_CRC_BYTES:])
    size = _HEADER.unpack_from(frame)[4]
    if size != out.nbytes:
        raise ValueError(f"it holds {size} bytes of numbers, not {out.nbytes}")
    blosc.decompress(frame, out)


def read(path: Path, out: NDArray[Any]) -> None:
    """Fill contiguous `out` with a chunk's file. Numbers that stand in it as they are go from the file into `out`.

    Raises `OSError` where there is no such file, `ValueError` as `decode` does.
    """
    with path.open("rb", buffering=0) as file:
        header = file.read(_HEADER.size)
        is_as_it_is = len(header) == _HEADER.size and header[2] & _AS_IT_IS and _HEADER.unpack(header)[4] == out.nbytes
        if not is_as_it_is:
            decode(header + file.read(), out)
            return
        content = out.reshape(-1).view(np.uint8)
        start = 0
        while start < content.size and (count := file.readinto(content[start:])):  # a raw file may give a part only
            start += count
        check = file.read()
    if start < content.size or len(check) != _CRC_BYTES:
        raise ValueError(f"it has {_HEADER.size + start + len(check)} bytes")
    _compare(checksum([header, content]), check)


def _compare(found: int, check: bytes) -> None:
    told = int.from_bytes(check, "little")
    if found != told:
        raise ValueError(f"its CRC-32C is {found:08x}, not {told:08x}")


def checksum(parts: list[Any]) -> int:
    """CRC-32C of `parts`, one behind the other."""
    crc = 0
    for part in parts:
        crc = google_crc32c.extend(crc, np.frombuffer(part, np.uint8))
    return int(crc)
