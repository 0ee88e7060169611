"""The counter of sent bytes: every function that torch.distributed offers for tensors, by the plan's convention."""

from __future__ import annotations

from typing import Any

from ranks import run_ranks

RANKS = 4
# bytes that rank 0 of 4 sends when the tensor that is whole holds 8 float32 values, 32 bytes
EXPECTED = {
    "all_reduce": ("all-reduce", 2 * 24),
    "all_reduce coalesced": ("all-reduce", 2 * 2 * 24),
    "all_gather": ("all-gather", 24),
    "all_gather_into_tensor": ("all-gather", 24),
    "reduce_scatter_tensor": ("reduce-scatter", 24),
    "all_to_all_single": ("all-to-all", 24),
    "all_to_all_single, uneven": ("all-to-all", 4 * (1 + 0 + 3)),
    "broadcast": ("broadcast", 24),
    "isend and irecv": ("send", 32),
    "batch_isend_irecv": ("send", 32),
}


def _count_each(rank: int, world_size: int) -> dict[str, tuple[dict[Any, int], str]]:
    import torch
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import _coalescing_manager

    from engram_megatron.training.collective_bytes import count_collective_bytes

    whole, part = torch.ones(8), torch.ones(2)
    peer = (rank + 1) % world_size
    of_first = [2, 1, 0, 3]
    splits = of_first if rank == 0 else [1, 1, 1, 1]
    back = [of_first[rank], 1, 1, 1]  # what each rank sends to this one
    all_reduce = dist.all_reduce  # a name bound before the counter is there

    def coalesced() -> None:
        with _coalescing_manager():
            all_reduce(whole.clone())
            all_reduce(whole.clone())

    def alone() -> None:
        requests = [dist.isend(whole, peer), dist.irecv(torch.empty(8), (rank - 1) % world_size)]
        for request in requests:
            request.wait()

    def batched() -> None:
        send = dist.P2POp(dist.isend, whole, peer)
        receive = dist.P2POp(dist.irecv, torch.empty(8), (rank - 1) % world_size)
        for request in dist.batch_isend_irecv([send, receive]):
            request.wait()

    calls = {
        "all_reduce": lambda: all_reduce(whole.clone()),
        "all_reduce coalesced": coalesced,
        "all_gather": lambda: dist.all_gather([torch.empty(2) for _ in range(world_size)], part),
        "all_gather_into_tensor": lambda: dist.all_gather_into_tensor(torch.empty(8), part),
        "reduce_scatter_tensor": lambda: dist.reduce_scatter_tensor(torch.empty(2), whole),
        "all_to_all_single": lambda: dist.all_to_all_single(torch.empty(8), whole),
        "all_to_all_single, uneven": lambda: dist.all_to_all_single(
            torch.empty(sum(back)), torch.ones(sum(splits)), back, splits
        ),
        "broadcast": lambda: dist.broadcast(whole.clone(), 0),
        "isend and irecv": alone,
        "batch_isend_irecv": batched,
    }
    counted = {}
    for name, function in calls.items():
        with count_collective_bytes() as sent:
            function()
        all_reduce(whole.clone())  # after the block: counted by nobody
        counted[name] = (dict(sent), dist.group.WORLD.group_name)
    return counted


def test_every_function_is_counted_once_under_its_group() -> None:
    of_first = run_ranks(_count_each, RANKS)[0]
    for name, (collective, size) in EXPECTED.items():
        sent, world = of_first[name]
        assert sent == {(world, collective): size}, name
    assert set(of_first) == set(EXPECTED)
