"""The exchange over MPI, on the hosts' buffers: InfiniBand or a vendor's network without TCP.

Only here and in `training/mpi_launch.py` is mpi4py imported, and importing it initialises MPI. The program must have
been started by mpirun, or by srun with an MPI plugin.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from engram_megatron.errors import UsageError
from engram_megatron.gather.transport.protocol import TransportError, byte_view, result_tensor, row_bytes
from engram_megatron.gather.transport.watchdog import Watchdog

MAX_COUNT = 2**31 - 1  # MPI's C int, in which an exchange's rows are counted


class MpiTransport:
    """All-to-all by MPI_Alltoallv between hosts' memories.

    `communicator` is an mpi4py communicator that nothing else uses (`Split` or `Dup` makes one); a thread of its own
    may drive it. The unit of an exchange is a row, not a byte, so that pieces may be larger than 2 GiB.

    MPI knows no timeouts: an exchange that takes longer than `timeout_s` ends this process, whereupon mpirun ends the
    others.
    """

    def __init__(self, communicator: Any, timeout_s: float) -> None:
        self.communicator = communicator
        self.rank: int = communicator.Get_rank()
        self.size: int = communicator.Get_size()
        self._watchdog = Watchdog(timeout_s)

    def start_numbers(self, numbers: NDArray[np.int64]) -> Callable[[], NDArray[np.int64]]:
        received = np.empty(self.size, np.int64)
        request = self.communicator.Ialltoall(numbers, received)

        def wait() -> NDArray[np.int64]:
            with self._watchdog.watch(f"rank {self.rank} of {self.size}: the exchange of numbers over MPI"):
                request.Wait()
            return received

        return wait

    def exchange(
        self,
        rows: torch.Tensor,
        send_counts: NDArray[np.int64],
        receive_counts: NDArray[np.int64],
        *,
        what: str = "rows",
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As of `Transport`. Raises `TransportError` for more than 2^31 - 1 rows in or out."""
        assert rows.device.type == "cpu", rows.device
        assert rows.shape[0] == send_counts.sum(), (rows.shape, send_counts)
        if max(rows.shape[0], int(receive_counts.sum())) > MAX_COUNT:
            raise TransportError(
                f"{rows.shape[0]} {what} out and {int(receive_counts.sum())} in are more than MPI counts in one "
                f"exchange ({MAX_COUNT}); use fewer tokens per step and rank, or the gloo transport"
            )
        received = result_tensor(rows, int(receive_counts.sum()), out)
        row_type = _row_type(row_bytes(rows))
        try:
            with self._watchdog.watch(f"rank {self.rank} of {self.size}: the exchange of {what} over MPI"):
                self.communicator.Alltoallv(
                    [byte_view(rows.contiguous()), _counts_and_offsets(send_counts), row_type],
                    [byte_view(received), _counts_and_offsets(receive_counts), row_type],
                )
        finally:
            row_type.Free()
        return received


def _row_type(num_bytes: int) -> Any:
    from mpi4py import MPI

    return MPI.BYTE.Create_contiguous(num_bytes).Commit()


def _counts_and_offsets(counts: NDArray[np.int64]) -> tuple[list[int], list[int]]:
    return counts.tolist(), (np.cumsum(counts) - counts).tolist()


def world_communicator(rank: int, size: int) -> Any:
    """MPI_COMM_WORLD, proven to number this process as torch.distributed does: `rank` of `size`.

    Raises:
        UsageError: no mpi4py or no MPI library; the program was not started by MPI's launcher, or ranks differ; MPI
            was initialised for use by one thread only.
    """
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: mpi4py's wheels look for the library at import
        reason = " ".join(str(error).split())
        raise UsageError(
            f"the MPI transport needs mpi4py and an MPI library ({reason}): pip install 'engram-megatron[mpi]' beside "
            "your cluster's MPI, or choose the gloo transport"
        ) from error
    world = MPI.COMM_WORLD
    if (world.Get_size(), world.Get_rank()) != (size, rank):
        library = MPI.Get_library_version().split("\n")[0].strip("\0 ")
        raise UsageError(
            f"the MPI transport needs ranks that mpirun or srun started with the MPI that mpi4py uses ({library}): "
            f"this process is rank {world.Get_rank()} of {world.Get_size()} to MPI and {rank} of {size} to "
            "torch.distributed (torchrun starts no MPI ranks); start it with that mpirun, or choose the gloo transport"
        )
    if MPI.Query_thread() < MPI.THREAD_SERIALIZED:
        raise UsageError(
            f"MPI was initialised with thread level {MPI.Query_thread()}, and the transport is driven by a thread of "
            f"its own, which needs {MPI.THREAD_SERIALIZED} (MPI_THREAD_SERIALIZED): leave mpi4py.rc.thread_level at "
            "'multiple' and use an MPI built with threads, or choose the gloo transport"
        )
    return world
