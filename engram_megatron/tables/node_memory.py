"""Memory that the ranks of one node share.

It has no name in any file system (memfd): it ends with the last process that has it open, so a killed job leaves
nothing behind, and no /dev/shm limits its size. Others open it by the process that made it, through /proc.
"""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from engram_megatron.errors import UsageError

HugePages = Literal["none", "transparent", "reserved"]
HUGE_PAGE_BYTES = 2 * 1024**2


@dataclass(frozen=True)
class MemoryHandle:
    """Names a `NodeMemory` to other processes of the node; valid while the process that made it has it open."""

    pid: int
    descriptor: int
    num_bytes: int
    name: str  # of this piece alone: a process of another container may have the same number


class NodeMemory:
    """Zero-filled bytes, resident page by page as they are written. Made by `create` or `open`."""

    def __init__(self, descriptor: int, num_bytes: int, handle: MemoryHandle) -> None:
        self.handle = handle
        self._descriptor = descriptor
        self._map = mmap.mmap(descriptor, num_bytes, mmap.MAP_SHARED)

    @classmethod
    def create(cls, num_bytes: int, huge_pages: HugePages = "none") -> NodeMemory:
        """Raises `UsageError` where the kernel has not enough reserved huge pages for `huge_pages = reserved`."""
        reserved = huge_pages == "reserved"
        num_bytes = max(1, num_bytes)
        if reserved:
            num_bytes = -(-num_bytes // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
        flags = os.MFD_CLOEXEC | (os.MFD_HUGETLB if reserved else 0)
        name = f"engram_{os.urandom(8).hex()}"
        descriptor = os.memfd_create(name, flags)
        os.ftruncate(descriptor, num_bytes)
        try:
            memory = cls(descriptor, num_bytes, MemoryHandle(os.getpid(), descriptor, num_bytes, name))
        except OSError as error:
            os.close(descriptor)
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
    def open(cls, handle: MemoryHandle) -> NodeMemory:
        """The same bytes in another process of the node.

        Raises `UsageError` where the system does not let this process see them.
        """
        path = f"/proc/{handle.pid}/fd/{handle.descriptor}"
        problem = None
        try:
            if os.readlink(path).startswith(f"/memfd:{handle.name}"):
                return cls(os.open(path, os.O_RDWR | os.O_CLOEXEC), handle.num_bytes, handle)
            problem = "it is another process here"
        except OSError as error:
            problem = str(error.strerror)
        raise UsageError(
            f"the tables of process {handle.pid} on this host cannot be opened ({problem}): the ranks of a node must "
            "run as one user and see each other's processes; else set tables.ranks_per_node=1"
        )

    def commit(self) -> None:
        """Take all the memory now, so that it cannot run out later."""
        os.posix_fallocate(self._descriptor, 0, self.handle.num_bytes)

    def array(self, shape: tuple[int, ...], dtype: Any, offset: int = 0) -> NDArray[Any]:
        """A view of `shape` and `dtype` that starts `offset` bytes in; it keeps the memory mapped."""
        count = int(np.prod(shape, dtype=np.int64))
        return np.frombuffer(self._map, dtype, count, offset).reshape(shape)

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)  # views keep the mapping, the descriptor is for those who open it later


def _free_huge_pages() -> str:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("HugePages_Free:"):
            return line.split()[1]
    return "none"
