"""torchrun's variables for ranks that mpirun, or srun with an MPI plugin, has started.

MPI itself knows ranks and hosts, whatever its launcher calls its own variables: those only tell that there was one.
"""

from __future__ import annotations

import contextlib
import os
import random
import socket
from collections.abc import Mapping
from typing import Any

from engram_megatron.errors import UsageError

# Variables with the number of processes of the job: Open MPI; MPICH, Intel MPI, Cray and srun --mpi=pmi2.
_SIZE_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


def num_mpi_processes(environment: Mapping[str, str]) -> int:
    """How many processes MPI's launcher started, 1 without one."""
    for name in _SIZE_VARIABLES:
        if name in environment:
            return int(environment[name])
    if "PMIX_RANK" in environment:  # srun --mpi=pmix
        return int(environment.get("SLURM_STEP_NUM_TASKS", "1"))
    return 1


def load_mpi(started: int, instead: str) -> tuple[Any, Any]:
    """MPI's communicator of all `started` processes, and the key that splits it by host. Initialises MPI.

    Raises `UsageError`, with `instead` as the other way, where there is no mpi4py or MPI library, or mpi4py's MPI is
    not the one whose launcher was used.
    """
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: mpi4py's wheels look for the library at import
        reason = " ".join(str(error).split())
        raise UsageError(
            f"an MPI launcher started {started} processes, and mpi4py cannot be loaded ({reason}): pip install "
            f"'engram-megatron[mpi]' beside your cluster's MPI, or {instead}"
        ) from error
    world = MPI.COMM_WORLD
    if world.Get_size() != started:
        library = MPI.Get_library_version().split("\n")[0].strip("\0 ")
        raise UsageError(
            f"an MPI launcher started {started} processes, and the MPI that mpi4py uses ({library}) sees "
            f"{world.Get_size()}: start the ranks with the mpirun of that library, or {instead}"
        )
    return world, MPI.COMM_TYPE_SHARED


def join_mpi_launch() -> bool:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT if MPI's launcher started this
    process among several, and torchrun did not (RANK is not set). Returns whether it did.

    Collective over MPI's ranks, and initialises MPI. Variables that are set are left as they are: MASTER_ADDR, for one,
    where the first host's name does not resolve or its network is not the right one.

    Raises:
        UsageError: no mpi4py or MPI library; or mpi4py's MPI is not the one whose launcher was used.
    """
    started = num_mpi_processes(os.environ)
    if "RANK" in os.environ or started == 1:
        return False
    world, shared_memory = load_mpi(started, "start the ranks with torchrun")
    for name, value in _torchrun_variables(world, shared_memory).items():
        os.environ.setdefault(name, value)
    return True


def _torchrun_variables(world: Any, shared_memory: Any) -> dict[str, str]:
    host = world.Split_type(shared_memory)
    address, port = world.bcast((socket.gethostname(), _free_port()) if world.Get_rank() == 0 else None)
    variables = {
        "RANK": str(world.Get_rank()),
        "WORLD_SIZE": str(world.Get_size()),
        "LOCAL_RANK": str(host.Get_rank()),
        "LOCAL_WORLD_SIZE": str(host.Get_size()),
        # a lone host need not resolve its own name
        "MASTER_ADDR": "127.0.0.1" if host.Get_size() == world.Get_size() else address,
        "MASTER_PORT": str(port),
    }
    host.Free()
    return variables


def _free_port() -> int:
    """A port of this host that nobody listens on, below the range of outgoing connections, which could take it before
    rank 0 listens."""
    while True:
        port = random.SystemRandom().randrange(12000, 30000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port
