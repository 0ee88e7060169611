"""Run one function on several ranks that a real mpiexec starts, in processes of their own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rank_program import rank_command, rank_environment, results

TIMEOUT_S = 300.0


def run_mpi_ranks(module: str, function: str, num_ranks: int, *args: Any) -> list[Any]:
    """Results by rank of `module.function(rank, num_ranks, *args)`, with a gloo default group beside MPI.

    `module` is importable from `tests/`; arguments and results can be pickled.
    """
    with tempfile.TemporaryDirectory() as folder:
        ended = start_mpi_ranks(module, function, num_ranks, *args, folder=folder)
        assert ended.returncode == 0, f"exit code {ended.returncode}\n{ended.stdout}\n{ended.stderr}"
        return results(folder, num_ranks)


def start_mpi_ranks(
    module: str, function: str, num_ranks: int, *args: Any, folder: str = ""
) -> subprocess.CompletedProcess[str]:
    return mpiexec(rank_command(module, function, folder, args), num_ranks)


def mpiexec(program: Sequence[str], num_ranks: int) -> subprocess.CompletedProcess[str]:
    """Run `program` under the mpiexec beside this Python, or else the one on the path."""
    found = shutil.which("mpiexec", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert found is not None, "no mpiexec: `make` installs one (the dev extra of pyproject.toml)"
    return subprocess.run(
        [found, "-n", str(num_ranks), *program],
        env=rank_environment(),
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
