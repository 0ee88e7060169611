"""Every transport must deliver the same pieces in the order of ranks. Those over MPI: test_mpi_transport.py."""

import threading

import pytest
import torch
import torch.distributed as dist
from exchange_cases import check_deliveries, check_numbers
from ranks import run_ranks

from engram_megatron.errors import UsageError
from engram_megatron.gather.transport import (
    CheckedTransport,
    DeviceTransport,
    GlooTransport,
    LoopbackTransport,
    Transport,
    all_ranks_transport,
    group_transport,
)

NODES_OF_TWO = [[0, 1], [2, 3]]
SAME_NUMBERED = [[0, 2], [1, 3]]
UNEVEN = [[3], [0, 1, 2]]


def _deliver_through_all(rank: int, world_size: int) -> list[str]:
    transport = all_ranks_transport(timeout_s=60)
    check_deliveries(transport)
    is_own = not isinstance(transport, CheckedTransport) or (
        isinstance(transport.inner, GlooTransport) and transport.inner.group is not dist.group.WORLD
    )
    assert is_own, "the exchange shares the default group with the backbone"
    return [str(member) for member in transport.members] if isinstance(transport, CheckedTransport) else []


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_all_ranks_by_gloo(world_size: int) -> None:
    for members in run_ranks(_deliver_through_all, world_size):
        assert len(members) == (0 if world_size == 1 else world_size)
        assert all(member.startswith(f"rank {rank} (") for rank, member in enumerate(members))


def _deliver_through_groups(rank: int, world_size: int) -> list[tuple[int, int, list[int]]]:
    seen = []
    for groups in (NODES_OF_TWO, SAME_NUMBERED, UNEVEN):
        transport = group_transport("gloo", groups, timeout_s=60)
        check_deliveries(transport)
        members = [m.rank for m in transport.members] if isinstance(transport, CheckedTransport) else []
        seen.append((transport.rank, transport.size, members))
    return seen


def test_ranks_of_a_node_and_same_numbered_ranks_by_gloo() -> None:
    answers = run_ranks(_deliver_through_groups, 4)
    assert answers[0] == [(0, 2, [0, 1]), (0, 2, [0, 2]), (0, 3, [0, 1, 2])]
    assert answers[1] == [(1, 2, [0, 1]), (0, 2, [1, 3]), (1, 3, [0, 1, 2])]
    assert answers[2] == [(0, 2, [2, 3]), (1, 2, [0, 2]), (2, 3, [0, 1, 2])]
    assert answers[3] == [(1, 2, [2, 3]), (1, 2, [1, 3]), (0, 1, [])]


def _deliver_through_device(rank: int, world_size: int) -> None:
    transport = DeviceTransport(dist.new_group(backend="gloo"), torch.device("cpu"))
    check_deliveries(transport)
    check_numbers(transport)


def test_device_transport_on_the_cpu() -> None:
    run_ranks(_deliver_through_device, 3)


def _deliver_from_a_thread(rank: int, world_size: int) -> None:
    failures: list[BaseException] = []

    def run(transport: Transport) -> None:
        try:
            check_deliveries(transport)
        except BaseException as error:
            failures.append(error)

    transports = [all_ranks_transport(timeout_s=60) for _ in range(2)]
    threads = [threading.Thread(target=run, args=(transport,)) for transport in transports]
    for thread in threads:
        thread.start()
    dist.all_reduce(torch.ones(3))  # the backbone's collectives go on meanwhile
    for thread in threads:
        thread.join()
    assert not failures, failures


def test_transports_in_threads_beside_collectives_of_the_main_thread() -> None:
    run_ranks(_deliver_from_a_thread, 2)


def test_single_process_without_a_process_group_gets_the_loopback() -> None:
    transport = all_ranks_transport(timeout_s=60)
    assert isinstance(transport, LoopbackTransport)
    check_deliveries(transport)


def _ask_for(rank: int, world_size: int, kind: str) -> str:
    with pytest.raises(UsageError) as refusal:
        all_ranks_transport(timeout_s=60, kind=kind)  # type: ignore[arg-type]
    return str(refusal.value)


def test_nccl_without_a_gpu_is_refused_on_every_rank() -> None:
    for message in run_ranks(_ask_for, 2, "nccl"):
        assert message.startswith("rank 0: the NCCL transport needs a GPU on every rank")
        assert "\n" not in message
