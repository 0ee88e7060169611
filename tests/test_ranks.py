"""The test harness itself: a failing or hanging rank must fail loudly."""

import sys
import time

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks


def _sum_of_ranks(rank: int, world_size: int) -> tuple[list[float], bool]:
    total = torch.ones(2) * rank
    dist.all_reduce(total)
    return total.tolist(), "megatron.core.optimizer" in sys.modules


def _second_rank_raises(rank: int, world_size: int) -> None:
    if rank == 1:
        raise ValueError("planted")
    dist.barrier()


def _second_rank_sleeps(rank: int, world_size: int) -> None:
    if rank == 1:
        time.sleep(100)
    dist.barrier()


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_results_come_back_by_rank_from_a_preloaded_server(world_size: int) -> None:
    expected = float(sum(range(world_size)))
    assert run_ranks(_sum_of_ranks, world_size) == [([expected] * 2, True)] * world_size


def test_error_of_one_rank_fails_the_test() -> None:
    with pytest.raises(AssertionError, match=r"rank 1 failed(.|\n)*planted"):
        run_ranks(_second_rank_raises, 2)


def test_hang_of_one_rank_fails_the_test_with_its_stack() -> None:
    with pytest.raises(AssertionError, match=r"hang(.|\n)*_second_rank_sleeps"):
        run_ranks(_second_rank_sleeps, 2, timeout_s=5)
