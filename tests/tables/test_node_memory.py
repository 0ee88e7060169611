"""Memory that ranks share: seen by others as written, gone with its processes, refused with a reason."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist
from ranks import run_ranks

from engram_megatron.errors import UsageError
from engram_megatron.tables.node_memory import NodeMemory


def _write_and_read(rank: int, world_size: int) -> list[int]:
    memory = NodeMemory.create(1000)
    memory.array((250,), np.int32)[:] = rank
    handles = [memory.handle] * world_size
    dist.all_gather_object(handles, memory.handle)
    others = [NodeMemory.open(handle) for handle in handles]
    seen = [int(other.array((250,), np.int32)[249]) for other in others]
    dist.barrier()
    others[(rank + 1) % world_size].array((250,), np.int32)[7] = 100 + rank
    dist.barrier()
    return [*seen, int(memory.array((250,), np.int32)[7])]


def test_ranks_see_what_others_wrote() -> None:
    assert run_ranks(_write_and_read, 3) == [[0, 1, 2, 102], [0, 1, 2, 100], [0, 1, 2, 101]]


def test_huge_sizes_cost_nothing_before_they_are_written() -> None:
    memory = NodeMemory.create(10 * 1024**4)
    memory.array((1,), np.int8, offset=9 * 1024**4)[:] = 1
    assert _resident_bytes() < 4 * 1024**3


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def test_views_outlive_the_object() -> None:
    view = NodeMemory.create(100).array((10,), np.float32)
    view[:] = 3
    assert view.sum() == 30


def test_killed_process_leaves_nothing_behind() -> None:
    code = (
        "import os, signal, numpy as np\n"
        "from engram_megatron.tables.node_memory import NodeMemory\n"
        "memory = NodeMemory.create(2**20)\n"
        "memory.array((2**20,), np.int8)[:] = 1\n"
        "print(memory.handle.name, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    before = set(os.listdir("/dev/shm"))
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert killed.returncode == -9, killed.stderr
    name = killed.stdout.strip()
    assert name.startswith("engram_")
    assert not [entry for entry in set(os.listdir("/dev/shm")) - before if "engram" in entry]


def test_memory_of_a_process_that_is_gone_is_refused() -> None:
    memory = NodeMemory.create(100)
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    with pytest.raises(UsageError, match=rf"process {process.pid} .* cannot be opened .*tables\.ranks_per_node=1"):
        NodeMemory.open(replace(memory.handle, pid=process.pid))


def test_process_of_another_container_with_the_same_number_is_not_taken_for_it() -> None:
    memory, other = NodeMemory.create(100), NodeMemory.create(100)
    with pytest.raises(UsageError, match="it is another process here"):
        NodeMemory.open(replace(memory.handle, name=other.handle.name))


def test_too_few_reserved_huge_pages_are_told_with_the_numbers() -> None:
    with pytest.raises(UsageError, match=r"needs 524288 free huge pages of 2 MiB .* are free .*huge_pages=transparent"):
        NodeMemory.create(2**40, "reserved")
