"""Chunks are what zarr's codecs make and read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec

from engram_checkpoints.table_chunks import decode, encode, read

CODECS = [BloscCodec(cname="lz4", clevel=1, shuffle="noshuffle"), Crc32cCodec()]


def _values(shape: tuple[int, ...], dtype: str, zeros: float) -> np.ndarray[Any, Any]:
    generator = np.random.default_rng(0)
    values = generator.standard_normal(shape).astype(dtype)
    values[generator.random(shape[0]) < zeros] = 0
    return values


def _chunk(values: np.ndarray[Any, Any], *, compress: bool) -> bytes:
    return b"".join(bytes(part) for part in encode(values, compress=compress))


def _array(path: Path, values: np.ndarray[Any, Any]) -> Any:
    return zarr.create_array(
        path, shape=values.shape, chunks=values.shape, dtype=values.dtype, filters=None, compressors=CODECS
    )


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("shape", [(16384, 80), (300, 5), (1, 2)])
@pytest.mark.parametrize("dtype", ["float32", "float64", "int32"])
@pytest.mark.parametrize("zeros", [0.0, 0.5, 1.0])
def test_zarr_reads_our_chunks_and_we_read_zarrs(
    tmp_path: Path, compress: bool, shape: tuple[int, ...], dtype: str, zeros: float
) -> None:
    values = _values(shape, dtype, zeros)
    array = _array(tmp_path / "array", values)
    array[:] = values + 1
    file = tmp_path / "array/c/0/0"
    out = np.empty_like(values)
    decode(file.read_bytes(), out)
    np.testing.assert_array_equal(out, values + 1)
    ours = _chunk(values, compress=compress)
    file.write_bytes(ours)
    np.testing.assert_array_equal(array[:], values)
    decode(ours, out)
    np.testing.assert_array_equal(out, values)
    out[:] = -1
    read(file, out)
    np.testing.assert_array_equal(out, values)


def test_zeros_vanish_and_noise_costs_a_header() -> None:
    noise, half = (_values((16384, 80), "float32", zeros) for zeros in (0.0, 0.5))
    assert len(_chunk(noise, compress=False)) == noise.nbytes + 20
    assert len(_chunk(half, compress=True)) < 0.52 * half.nbytes


@pytest.mark.parametrize("compress", [True, False])
def test_every_kind_of_damage_is_found(tmp_path: Path, compress: bool) -> None:
    values = _values((50, 8), "float32", 0.3)
    chunk = _chunk(values, compress=compress)
    for position in range(len(chunk)):
        damaged = bytearray(chunk)
        damaged[position] ^= 0x10
        with pytest.raises(ValueError, match="CRC-32C"):
            decode(bytes(damaged), np.empty_like(values))
        (tmp_path / "chunk").write_bytes(damaged)
        with pytest.raises(ValueError, match="CRC-32C"):
            read(tmp_path / "chunk", np.empty_like(values))
    for length in (0, 3, 19, 20, len(chunk) // 2, len(chunk) - 1):
        with pytest.raises(ValueError, match=r"it has|CRC-32C"):
            decode(chunk[:length], np.empty_like(values))
        (tmp_path / "chunk").write_bytes(chunk[:length])
        with pytest.raises(ValueError, match=r"it has|CRC-32C"):
            read(tmp_path / "chunk", np.empty_like(values))
    with pytest.raises(ValueError, match="it holds 1600 bytes of numbers, not 800"):
        decode(chunk, np.empty((50, 4), np.float32))
