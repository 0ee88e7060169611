"""Every transport must deliver the same pieces in the order of ranks."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from engram_megatron.gather.transport import GlooTransport, LoopbackTransport, all_ranks_transport

Exchanged = tuple[str, bool, list[int], list[list[float]], list[int]]


def _count(source: int, destination: int) -> int:
    """Rows from one rank to another: many zeros among them, rank 1 sends nothing, rank 2 receives nothing."""
    return 0 if source == 1 or destination == 2 else (source + 2 * destination) % 3


def _exchange(rank: int, world_size: int) -> Exchanged:
    transport = all_ranks_transport(timeout_s=60)
    counts = np.array([_count(rank, r) for r in range(world_size)], np.int64)
    from_ranks = transport.exchange_counts(counts)
    sent = [[rank, r, i] for r in range(world_size) for i in range(_count(rank, r))]
    rows = torch.tensor(sent, dtype=torch.float64).reshape(-1, 3)
    received = transport.exchange(rows, counts, from_ranks)
    ids = transport.exchange(rows[:, 2].to(torch.int64), counts, from_ranks)
    is_own = not isinstance(transport, GlooTransport) or transport.group is not dist.group.WORLD
    return type(transport).__name__, is_own, from_ranks.tolist(), received.tolist(), ids.tolist()


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_pieces_arrive_in_the_order_of_ranks_also_where_a_rank_sends_or_gets_nothing(world_size: int) -> None:
    answers = run_ranks(_exchange, world_size)
    for rank, (name, is_own, counts, rows, ids) in enumerate(answers):
        assert name == ("LoopbackTransport" if world_size == 1 else "GlooTransport")
        assert is_own, "the exchange shares the default group with the backbone"
        assert counts == [_count(r, rank) for r in range(world_size)]
        assert rows == [[r, rank, i] for r in range(world_size) for i in range(_count(r, rank))]
        assert ids == [int(row[2]) for row in rows]


def _exchange_nothing(rank: int, world_size: int) -> list[int]:
    nothing = np.zeros(world_size, np.int64)
    return list(all_ranks_transport(60).exchange(torch.empty(0, 5), nothing, nothing).shape)


def test_exchange_in_which_no_rank_sends_anything() -> None:
    assert run_ranks(_exchange_nothing, 2) == [[0, 5]] * 2


def test_single_process_without_a_process_group_gets_the_loopback() -> None:
    transport = all_ranks_transport(timeout_s=60)
    assert isinstance(transport, LoopbackTransport)
    assert transport.exchange_counts(np.array([3])).tolist() == [3]
