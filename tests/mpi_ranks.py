"""Run one function on several ranks that a real mpiexec starts, in processes of their own."""

from __future__ import annotations

import importlib
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TIMEOUT_S = 300.0


def run_mpi_ranks(module: str, function: str, num_ranks: int, *args: Any) -> list[Any]:
    """Results by rank of `module.function(rank, num_ranks, *args)`, with a gloo default group beside MPI.

    `module` is importable from `tests/`; arguments and results can be pickled.
    """
    with tempfile.TemporaryDirectory() as folder:
        ended = start_mpi_ranks(module, function, num_ranks, *args, folder=folder)
        assert ended.returncode == 0, f"exit code {ended.returncode}\n{ended.stdout}\n{ended.stderr}"
        return [pickle.loads(Path(folder, str(rank)).read_bytes()) for rank in range(num_ranks)]


def start_mpi_ranks(
    module: str, function: str, num_ranks: int, *args: Any, folder: str = ""
) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, __file__, module, function, folder, pickle.dumps(args).hex()]
    return mpiexec(program, num_ranks)


def mpiexec(program: Sequence[str], num_ranks: int) -> subprocess.CompletedProcess[str]:
    """Run `program` under the mpiexec beside this Python, or else the one on the path."""
    found = shutil.which("mpiexec", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert found is not None, "no mpiexec: `make` installs one (the dev extra of pyproject.toml)"
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    return subprocess.run(
        [found, "-n", str(num_ranks), *program],
        env=environment,
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )


def _rank_main(module: str, function: str, folder: str, args: str) -> None:
    from engram_megatron.training.mpi_launch import join_mpi_launch

    assert join_mpi_launch()
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
    _rank_main(*sys.argv[1:])
