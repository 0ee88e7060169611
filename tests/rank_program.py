"""The program of a rank in a process of its own: runs one function, with a gloo default group.

    python rank_program.py MODULE FUNCTION FOLDER ARGUMENTS

Launched by MPI, or with torchrun's variables set. The pickled result goes to FOLDER under the rank's number.
"""

from __future__ import annotations

import importlib
import os
import pickle
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def rank_command(module: str, function: str, folder: str, args: Sequence[Any]) -> list[str]:
    """Starts `module.function(rank, num_ranks, *args)`; `folder` "": nobody wants the result."""
    return [sys.executable, __file__, module, function, folder, pickle.dumps(tuple(args)).hex()]


def rank_environment() -> dict[str, str]:
    """That of this process without the variables of a launcher; imports find what they find here."""
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    return environment


def results(folder: str, num_ranks: int) -> list[Any]:
    """By rank."""
    return [pickle.loads(Path(folder, str(rank)).read_bytes()) for rank in range(num_ranks)]


def _main(module: str, function: str, folder: str, args: str) -> None:
    from engram_megatron.training.mpi_launch import join_mpi_launch

    launched_by_mpi = "RANK" not in os.environ
    assert join_mpi_launch() == launched_by_mpi
    import torch
    import torch.distributed as dist

    from engram_megatron import platform

    platform.limit_threads(1)
    platform.install()
    rank, num_ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo")
    assert not torch.cuda.is_initialized()
    result = getattr(importlib.import_module(module), function)(rank, num_ranks, *pickle.loads(bytes.fromhex(args)))
    if folder:
        Path(folder, str(rank)).write_bytes(pickle.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    _main(*sys.argv[1:])
