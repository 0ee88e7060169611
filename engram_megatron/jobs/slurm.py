"""Slurm's commands, and what they say."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from engram_megatron.errors import UsageError

_TIMEOUT_S = 60.0


class SlurmError(RuntimeError):
    """A command of Slurm's failed; in one line what it said."""


def check_here() -> None:
    """Raise `UsageError` where this machine cannot submit."""
    if shutil.which("sbatch") is None:
        raise UsageError(
            "sbatch is not on this machine: submit from a login node of the cluster, or try a cluster of "
            "your own with slurm/local_cluster.py"
        )


def submit(script: Path, *options: str) -> str:
    """Queue `script`; returns the job's id. Raises `UsageError` with what sbatch says."""
    return _sbatch("--parsable", *options, str(script)).strip().split(";")[0]


def check_accepted(script: Path) -> None:
    """Raise `UsageError` with what sbatch says of a script that it would not take. Queues nothing."""
    _sbatch("--test-only", str(script))


def jobs_of_name(name: str) -> dict[str, str]:
    """Id to state of this user's jobs called `name` that are queued or run."""
    output = _run("squeue", "--me", f"--name={name}", "--noheader", "--format=%i %T")
    return dict(line.split() for line in output.splitlines() if line.strip())


def exclude(job_id: str, nodes: str) -> None:
    """Keep a job that waits in the queue from `nodes`."""
    _run("scontrol", "update", f"jobid={job_id}", f"excnodelist={nodes}")


def requeue(job_id: str) -> None:
    """Put a running job back in the queue. It is ended now."""
    _run("scontrol", "requeue", job_id)


def kill_steps(job_id: str) -> None:
    """End all steps of a job that is this process's own; the batch step goes on."""
    for step in _run("squeue", "--steps", f"--jobs={job_id}", "--noheader", "--format=%i").split():
        number = step.rpartition(".")[2]
        if number.isdigit():
            _run("scancel", "--signal=KILL", step)


def run_beside(program: Sequence[str], timeout_s: float) -> None:
    """Run `program` once on every node of this process's job, beside its other steps. It prints to the job's log."""
    command = ["srun", "--overlap", "--ntasks-per-node=1", "--label", *program]
    try:
        subprocess.run(command, check=False, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        print(f"{program[1]} did not end within {timeout_s:g} s on every node", flush=True)


def is_cancelled(job_id: str) -> bool:
    """Whether somebody has asked Slurm to end the job for good."""
    return "JobState=CANCELLED" in _run("scontrol", "show", "job", job_id)


def hosts_of(node_list: str) -> list[str]:
    """The names that Slurm's short form stands for."""
    return _run("scontrol", "show", "hostnames", node_list).split()


def _sbatch(*arguments: str) -> str:
    try:
        return _run("sbatch", *arguments)
    except SlurmError as error:
        raise UsageError(str(error)) from error


def _run(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise SlurmError(f"{command[0]} did not answer within {_TIMEOUT_S:g} s") from error
    if done.returncode != 0:
        said = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise SlurmError(said if said.startswith(command[0]) else f"{command[0]}: {said}")
    return done.stdout
