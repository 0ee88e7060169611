"""Memory of one step serves the next one, and never two at once."""

import gc

import numpy as np
import torch
import torch.distributed as dist
from ranks import run_ranks

from engram_megatron.gather.buffers import BufferPool, SharedBufferPool


def _address(array: np.ndarray) -> int:
    return array.ctypes.data


def test_memory_comes_back_when_the_last_view_is_gone() -> None:
    pool = BufferPool()
    first = pool.empty((100, 8), np.float32)
    address = _address(first)
    view = torch.from_numpy(first)[3:]
    view.fill_(7)
    del first
    gc.collect()
    other = pool.empty((100, 8), np.float32)
    other[:] = 1
    assert _address(other) != address, "memory that a view still shows was given away"
    assert bool((view == 7).all())
    del view
    assert _address(pool.empty((90, 8), np.float32)) == address


def test_larger_arrays_replace_smaller_buffers() -> None:
    pool = BufferPool()
    for size in (10, 1000, 100_000):
        array = pool.empty((size,), np.float64)
        array[:] = size
        assert array.sum() == float(size) ** 2
        del array
    assert len(pool._free) == 1


def test_arrays_of_one_pool_do_not_overlap() -> None:
    pool = BufferPool()
    arrays = [pool.empty((size, 3), np.int16) for size in (5, 0, 7, 900, 5)]
    for number, array in enumerate(arrays):
        array[:] = number
    assert [set(array.ravel().tolist()) for array in arrays] == [{0}, set(), {2}, {3}, {4}]


def _share_what_grows(rank: int, world_size: int) -> tuple[list[list[int]], int]:
    pool = SharedBufferPool(dist.group.WORLD)
    seen = []
    for size in (4, 4, 0, 3000, 200_000):
        mine = pool.empty((size if rank == 0 else 2 * size, 2), np.int64)
        mine[:] = 10 * size + rank
        others = pool.share(mine)
        dist.barrier()
        assert [len(array) for array in others] == [size, 2 * size]
        seen.append([int(array.sum()) // max(1, array.size) for array in others])
        dist.barrier()
        del mine, others
    return seen, len(pool._opened)


def test_ranks_read_each_others_arrays_and_let_replaced_memory_go() -> None:
    for seen, opened in run_ranks(_share_what_grows, 2):
        assert seen == [[40, 41], [40, 41], [0, 0], [30_000, 30_001], [2_000_000, 2_000_001]]
        assert opened == 1


def test_lone_rank_shares_with_itself() -> None:
    pool = SharedBufferPool(None)
    array = pool.empty((3, 2), np.float32)
    assert pool.share(array)[0] is array
