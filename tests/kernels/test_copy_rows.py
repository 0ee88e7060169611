"""Rows between arrays and records bit for bit, and pages of a file that come when they are asked for."""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from pathlib import Path

import numpy as np
import pytest

from engram_kernels.copy_rows import copy_rows
from engram_kernels.read_ahead import PAGE_BYTES, read_ahead


def _pair(rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """bfloat16 bits [n, 4] and states [n, 10], all bits random: NaNs that signal among them."""
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 2**32, (rows, 10), np.uint32)
    bits[::3, 3] = 0x7F800001  # a signalling NaN
    return rng.integers(0, 2**16, (rows, 4), np.uint16), bits.view(np.float32)


def test_rows_are_copied_bit_for_bit_out_of_records_and_into_them() -> None:
    rng = np.random.default_rng(2)
    weight, state = _pair(1000, 0)
    records = np.zeros((1500, 48), np.uint8)
    planes = records[:, :8].view(np.uint16), records[:, 8:].view(np.float32)
    source, target = rng.choice(1000, 700, replace=False), rng.choice(1500, 700, replace=False)
    copy_rows((weight, state), source, planes, target)
    np.testing.assert_array_equal(records[target, :8].view(np.uint16), weight[source])
    np.testing.assert_array_equal(records[target, 8:].view(np.uint32), state[source].view(np.uint32))
    others = np.setdiff1d(np.arange(1500), target)
    assert not records[others].any()
    back = _pair(1000, 1)
    copy_rows(planes, target, back, source)
    np.testing.assert_array_equal(back[0][source], weight[source])
    np.testing.assert_array_equal(back[1][source].view(np.uint32), state[source].view(np.uint32))


@pytest.mark.parametrize("row", [-1, 5])
def test_rows_outside_either_arrays_are_an_error(row: int) -> None:
    five, ten = _pair(5, 0), _pair(10, 0)
    with pytest.raises(IndexError):
        copy_rows(five, np.array([row]), ten, np.array([0]))
    with pytest.raises(IndexError):
        copy_rows(ten, np.array([0]), five, np.array([row]))


def _in_memory(file: mmap.mmap) -> set[int]:
    """Pages of a mapped file that need not be read from the disk."""
    resident = np.empty(len(file) // PAGE_BYTES, np.uint8)
    address = ctypes.c_void_p(np.frombuffer(file, np.uint8).ctypes.data)
    assert ctypes.CDLL(None).mincore(address, ctypes.c_size_t(len(file)), ctypes.c_void_p(resident.ctypes.data)) == 0
    return set(np.flatnonzero(resident & 1).tolist())


def test_pages_that_are_asked_for_come_and_no_others(disk: Path) -> None:
    record, pages = 1000, 400
    rows = np.array([0, 1, 2, 3, 4, 90, 89, 700, 1200])
    wanted = {byte // PAGE_BYTES for row in rows for byte in (row * record, (row + 1) * record - 1)}
    with (disk / "file").open("w+b") as file:
        file.write(os.urandom(pages * PAGE_BYTES))
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        mapped = mmap.mmap(file.fileno(), 0)
        if _in_memory(mapped):
            pytest.skip("this file system keeps pages that it was told to drop")
        read_ahead(file.fileno(), rows[:0], record)
        assert not _in_memory(mapped)
        read_ahead(file.fileno(), rows, record)
        deadline = time.monotonic() + 20
        while _in_memory(mapped) != wanted and time.monotonic() < deadline:
            time.sleep(0.01)
        assert _in_memory(mapped) == wanted
