"""Memory that the ranks of one node share, and files on a disk that they use as memory.

Neither has a name in any file system (memfd; a file that is unlinked as soon as it is made): it ends with the last
process that has it open, so a killed job leaves nothing behind, and no /dev/shm limits its size. Others open it by the
process that made it, through /proc.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from engram_megatron.errors import UsageError

HugePages = Literal["none", "transparent", "reserved"]
HUGE_PAGE_BYTES = 2 * 1024**2
ArraySpec = tuple[tuple[int, ...], np.dtype[Any]]  # shape and type


@dataclass(frozen=True)
class MemoryHandle:
    """Names a `NodeMemory` to other processes of the node; valid while the process that made it has it open."""

    pid: int
    descriptor: int
    num_bytes: int
    name: str  # of this piece alone: a process of another container may have the same number
    is_file: bool


class NodeMemory:
    """Zero-filled bytes, resident page by page as they are written. Made by `create`, `create_file` or `open`."""

    def __init__(self, descriptor: int, num_bytes: int, handle: MemoryHandle) -> None:
        self._map = mmap.mmap(descriptor, num_bytes, mmap.MAP_SHARED)
        self.handle = handle
        self.descriptor = descriptor
        if handle.is_file:
            self._map.madvise(mmap.MADV_RANDOM)  # no neighbours are read along with a page

    @classmethod
    def create(cls, num_bytes: int, huge_pages: HugePages = "none") -> NodeMemory:
        """Raises `UsageError` where the kernel has not enough reserved huge pages for `huge_pages = reserved`."""
        reserved = huge_pages == "reserved"
        if reserved:
            num_bytes = -(-max(1, num_bytes) // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
        flags = os.MFD_CLOEXEC | (os.MFD_HUGETLB if reserved else 0)
        name = _new_name()
        try:
            memory = cls._sized(os.memfd_create(name, flags), num_bytes, name, is_file=False)
        except OSError as error:
            if not reserved:
                raise
            raise UsageError(
                f"tables.huge_pages = reserved needs {num_bytes // HUGE_PAGE_BYTES} free huge pages of 2 MiB for this "
                f"rank, {_free_huge_pages()} are free on this host; raise vm.nr_hugepages, or set "
                "tables.huge_pages=transparent"
            ) from error
        if huge_pages == "transparent" and hasattr(mmap, "MADV_HUGEPAGE"):
            memory._map.madvise(mmap.MADV_HUGEPAGE)  # a request: see /sys/kernel/mm/transparent_hugepage/shmem_enabled
        return memory

    @classmethod
    def create_file(cls, folder: Path, num_bytes: int) -> NodeMemory:
        """In a file without a name on the disk of `folder`, sparse until it is written."""
        name = _new_name()
        path = folder / name
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        path.unlink()
        return cls._sized(descriptor, num_bytes, name, is_file=True)

    @classmethod
    def _sized(cls, descriptor: int, num_bytes: int, name: str, *, is_file: bool) -> NodeMemory:
        """Of a new `descriptor`, closed where this fails."""
        num_bytes = max(1, num_bytes)
        try:
            os.ftruncate(descriptor, num_bytes)
            return cls(descriptor, num_bytes, MemoryHandle(os.getpid(), descriptor, num_bytes, name, is_file))
        except OSError as error:
            os.close(descriptor)
            if error.errno == errno.EFBIG:
                raise UsageError(
                    f"Engram tables need {num_bytes} bytes of shared memory for this rank, which a limit on the size "
                    "of files forbids (ulimit -f); lift it"
                ) from error
            raise

    @classmethod
    def open(cls, handle: MemoryHandle) -> NodeMemory:
        """The same bytes in another process of the node.

        Raises `UsageError` where the system does not let this process see them.
        """
        path = f"/proc/{handle.pid}/fd/{handle.descriptor}"
        problem = None
        try:
            if handle.name in os.readlink(path):
                return cls(os.open(path, os.O_RDWR | os.O_CLOEXEC), handle.num_bytes, handle)
            problem = "it is another process here"
        except OSError as error:
            problem = str(error.strerror)
        raise UsageError(
            f"the tables of process {handle.pid} on this host cannot be opened ({problem}): the ranks of a node must "
            "run as one user and see each other's processes; else set tables.ranks_per_node=1"
        )

    def commit(self) -> None:
        """Take all the memory or disk space now, so that it cannot run out later."""
        os.posix_fallocate(self.descriptor, 0, self.handle.num_bytes)

    def resident_bytes(self) -> int:
        """How much of it was ever written (or read, but for files), by any process: that much space it takes."""
        return os.fstat(self.descriptor).st_blocks * 512

    def drop_cache(self) -> None:
        """Have every page of a file read from the disk again, for measurements."""
        assert self.handle.is_file, "memory would be lost"
        os.fsync(self.descriptor)
        self._map.madvise(mmap.MADV_DONTNEED)  # pages that are mapped would stay
        os.posix_fadvise(self.descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

    def array(self, shape: tuple[int, ...], dtype: Any, offset: int = 0) -> NDArray[Any]:
        """A view of `shape` and `dtype` that starts `offset` bytes in; it keeps the memory mapped."""
        count = int(np.prod(shape, dtype=np.int64))
        return np.frombuffer(self._map, dtype, count, offset).reshape(shape)

    def arrays(self, specs: Sequence[ArraySpec]) -> list[NDArray[Any]]:
        """Views of the arrays `specs`, one after another, each at the border of a huge page."""
        return [self.array(*spec, start) for spec, start in zip(specs, _starts(specs), strict=False)]

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)  # views keep the mapping, the descriptor is for those who open it later


def bytes_of_arrays(specs: Sequence[ArraySpec]) -> int:
    """What `NodeMemory.arrays` needs."""
    return _starts(specs)[-1]


def _starts(specs: Sequence[ArraySpec]) -> list[int]:
    """Where each array begins, and where the last one ends."""
    starts = [0]
    for number, (shape, dtype) in enumerate(specs, start=1):
        end = starts[-1] + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        starts.append(end if number == len(specs) else -(-end // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES)
    return starts


def _new_name() -> str:
    return f"engram_{os.urandom(8).hex()}"


def _free_huge_pages() -> str:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("HugePages_Free:"):
            return line.split()[1]
    return "none"
