"""The exchange over MPI, between ranks that a real mpiexec starts, and its refusals elsewhere."""

from __future__ import annotations

import socket
import sys
from types import SimpleNamespace

import pytest
from mpi_ranks import run_mpi_ranks, start_mpi_ranks
from ranks import run_ranks

from engram_megatron.errors import UsageError
from engram_megatron.gather.transport import all_ranks_transport
from engram_megatron.gather.transport.mpi import world_communicator


def test_delivers_between_all_and_some_ranks_and_beside_gloo_in_threads() -> None:
    answers = run_mpi_ranks("mpi_cases", "deliver", 3)
    assert [answer["part"] for answer in answers] == [
        (0, 2, "CheckedTransport"),
        (0, 1, "LoopbackTransport"),
        (1, 2, "CheckedTransport"),
    ]
    for rank, answer in enumerate(answers):
        expected = {"RANK": str(rank), "WORLD_SIZE": "3", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "3"}
        assert answer["environment"] == expected


def test_damage_is_named_and_ends_every_rank() -> None:
    ended = start_mpi_ranks("mpi_cases", "fail_by_damage", 2)
    host = socket.gethostname()
    assert ended.returncode != 0
    assert (
        f"error: rank 1 ({host}) received row ids from rank 0 ({host}) that differ from what was sent" in ended.stderr
    )


def test_exchange_that_does_not_end_ends_the_ranks() -> None:
    ended = start_mpi_ranks("mpi_cases", "miss_an_exchange", 2)
    assert ended.returncode != 0
    assert "error: rank 0 of 2: the exchange of gradients over MPI did not end in 3 s" in ended.stderr


@pytest.mark.slow
def test_piece_of_more_than_2_gib() -> None:
    assert run_mpi_ranks("mpi_cases", "deliver_more_than_2_gib", 2) == [0, 2**31 + 3 * 4096]


def _ask_for_mpi(rank: int, world_size: int) -> str:
    with pytest.raises(UsageError) as refusal:
        all_ranks_transport(timeout_s=60, kind="mpi")
    return str(refusal.value)


def test_ranks_that_mpi_did_not_start_are_refused() -> None:
    for message in run_ranks(_ask_for_mpi, 2):
        assert message.startswith("rank 0: the MPI transport needs ranks that mpirun or srun started")
        assert "rank 0 of 1 to MPI and 0 of 2 to torch.distributed" in message
        assert "\n" not in message


def test_missing_mpi4py_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(UsageError, match=r"needs mpi4py and an MPI library \(.*mpi4py.*\): pip install"):
        world_communicator(0, 2)


def test_mpi_without_threads_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    world = SimpleNamespace(Get_size=lambda: 2, Get_rank=lambda: 0)
    mpi = SimpleNamespace(COMM_WORLD=world, THREAD_SERIALIZED=2, Query_thread=lambda: 1)
    monkeypatch.setitem(sys.modules, "mpi4py", SimpleNamespace(MPI=mpi))
    with pytest.raises(UsageError, match=r"thread level 1, .* needs 2 \(MPI_THREAD_SERIALIZED\)"):
        world_communicator(0, 2)
