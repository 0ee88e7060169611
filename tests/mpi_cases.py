"""What ranks under mpiexec do for tests/gather/test_mpi_transport.py and test_against_dense_adam.py."""

from __future__ import annotations

import os
import threading
import time
from typing import Any

import numpy as np
import torch
from dense_adam_case import Step, case_tables, history_of
from exchange_cases import check_deliveries, check_numbers
from numpy.typing import NDArray
from sharded_tables import sharded_tables

from engram_megatron.gather.transport import (
    CheckedTransport,
    MpiTransport,
    TransportError,
    all_ranks_transport,
    exercise_pairs,
    group_transport,
)

Int64 = NDArray[np.int64]


def deliver(rank: int, num_ranks: int) -> dict[str, object]:
    world = all_ranks_transport(timeout_s=60, kind="mpi")
    assert isinstance(world, CheckedTransport)
    assert isinstance(world.inner, MpiTransport)
    check_deliveries(world)
    check_deliveries(world.inner)
    check_numbers(world.inner)
    exercise_pairs(world)
    part = group_transport("mpi", [[1], [0, 2]], timeout_s=60)
    check_deliveries(part)
    _deliver_in_threads(world, group_transport("gloo", [range(num_ranks)], timeout_s=60))
    environment = {name: os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")}
    return {"part": (part.rank, part.size, type(part).__name__), "environment": environment}


def _deliver_in_threads(*transports: object) -> None:
    failures: list[BaseException] = []

    def run(transport: object) -> None:
        try:
            check_deliveries(transport)  # type: ignore[arg-type]
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(transport,)) for transport in transports]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures


class _ShiftingMpi(MpiTransport):
    """An MPI that moves what comes from rank 0 by a byte."""

    def exchange(
        self, rows: torch.Tensor, send_counts: Int64, receive_counts: Int64, *, what: str = "rows", out: Any = None
    ) -> torch.Tensor:
        received = super().exchange(rows, send_counts, receive_counts, what=what, out=out)
        if what == "row ids" and self.rank == 1:
            piece = received[: int(receive_counts[0])].numpy()
            piece[:] = np.roll(piece.view(np.uint8), 1).view(piece.dtype)
        return received


def fail_by_damage(rank: int, num_ranks: int) -> None:
    """Rank 1 leaves as a run does that fails; rank 0 learns of it from nobody but mpiexec."""
    checked = all_ranks_transport(timeout_s=60, kind="mpi")
    assert isinstance(checked, CheckedTransport)
    assert isinstance(checked.inner, MpiTransport)
    transport = CheckedTransport(_ShiftingMpi(checked.inner.communicator, 60), checked.members)
    counts = np.full(num_ranks, 100)
    try:
        while True:
            transport.exchange(torch.arange(100 * num_ranks), counts, counts, what="row ids")
    except TransportError as error:
        os.write(2, f"error: {error}\n".encode())
        os._exit(1)


def miss_an_exchange(rank: int, num_ranks: int) -> None:
    transport = all_ranks_transport(timeout_s=3, kind="mpi")
    if rank == 1:
        time.sleep(100)
    counts = np.ones(num_ranks, np.int64)
    transport.exchange(torch.zeros(num_ranks, 5), counts, counts, what="gradients")


def deliver_more_than_2_gib(rank: int, num_ranks: int) -> int:
    """Rank 0 sends rank 1 a piece of more bytes than a C int counts; returns the bytes that arrived."""
    transport = all_ranks_transport(timeout_s=300, kind="mpi")
    width, num_rows = 4096, 2**31 // 4096 + 3
    sends = np.array([0, num_rows]) if rank == 0 else np.array([0, 0])
    receives = np.array([num_rows, 0]) if rank == 1 else np.array([0, 0])
    rows = torch.zeros(int(sends.sum()), width, dtype=torch.uint8)
    rows[:, 0] = torch.arange(rows.shape[0]) % 251
    received = transport.exchange(rows, sends, receives)
    assert bool((received[:, 0] == torch.arange(received.shape[0]) % 251).all())
    return received.numel()


def train_tables(rank: int, num_ranks: int) -> list[Step]:
    """The steps of `dense_adam_case`, every rank a node of its own."""
    lookup, adam = sharded_tables(case_tables("float64", transport="mpi"), rank, num_ranks)
    rail = lookup.groups.rail
    assert isinstance(rail, CheckedTransport)
    assert isinstance(rail.inner, MpiTransport)
    return history_of(lookup, adam, rank)
