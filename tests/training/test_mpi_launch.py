"""Ranks from MPI's launcher instead of torchrun's. The variables they get: tests/gather/test_mpi_transport.py."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from mpi_ranks import mpiexec
from tiny_run import TINY

from engram_megatron.errors import UsageError
from engram_megatron.training.mpi_launch import join_mpi_launch, num_mpi_processes


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, 1),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "1"}, 1),
        ({"PMI_RANK": "1", "PMI_SIZE": "4"}, 4),
        ({"OMPI_COMM_WORLD_SIZE": "2", "PMIX_RANK": "0"}, 2),
        ({"PMIX_RANK": "3", "SLURM_STEP_NUM_TASKS": "8"}, 8),
        ({"PMIX_RANK": "0"}, 1),
    ],
)
def test_launchers_are_known_by_their_variables(environment: dict[str, str], expected: int) -> None:
    assert num_mpi_processes(environment) == expected


def test_ranks_of_torchrun_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PMI_SIZE", "4")
    monkeypatch.setenv("RANK", "1")
    assert not join_mpi_launch()


def test_launcher_of_another_mpi_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    world = SimpleNamespace(Get_size=lambda: 1)
    mpi = SimpleNamespace(COMM_WORLD=world, Get_library_version=lambda: "Open MPI v5.0.11\nmore")
    monkeypatch.setitem(sys.modules, "mpi4py", SimpleNamespace(MPI=mpi))
    monkeypatch.setenv("PMI_SIZE", "4")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(
        UsageError, match=r"started 4 processes, and the MPI that mpi4py uses \(Open MPI v5.0.11\) sees 1"
    ):
        join_mpi_launch()


def test_training_program_runs_under_mpiexec(tiny_corpus: Path, tmp_path: Path) -> None:
    overrides = [*TINY, f"data.corpus={tiny_corpus}", f"run_dir={tmp_path}/run"]
    ended = mpiexec([sys.executable, "launch/train.py", "engram_tiny", *overrides], 2)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("run folder") == 1
    assert "after 6 steps" in ended.stdout
