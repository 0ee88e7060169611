"""Slurm's commands, and what they say."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from engram_megatron.errors import UsageError

_TIMEOUT_S = 60.0
_SIGNAL_EARLY_S = 60.0  # Slurm's --signal comes up to a minute earlier than asked for
_UNUSABLE = ("down", "drain", "fail", "unknown", "power")


class SlurmError(RuntimeError):
    """A command of Slurm's failed; in one line what it said."""


@dataclass(frozen=True)
class QueuedJob:
    """A job that waits or runs. `state` and `reason` in Slurm's words: RUNNING, PENDING (Resources)."""

    job_id: str
    state: str
    reason: str


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


def queued_jobs(job_ids: Sequence[str]) -> list[QueuedJob] | None:
    """Those of `job_ids` that are in the queue; None where there is no squeue or it does not answer."""
    if not job_ids:
        return []
    try:
        output = _run("squeue", "--noheader", "--format=%i|%T|%r", f"--jobs={','.join(job_ids)}", timeout_s=10.0)
    except OSError:
        return None
    except SlurmError as error:
        return [] if "Invalid job id" in str(error) else None  # what it says of a job that ended some time ago
    return [QueuedJob(*line.split("|", 2)) for line in output.splitlines() if line.count("|") >= 2]


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


def why_signalled(job_id: str, signal_s: float) -> str | None:
    """What made Slurm send a running job the signal of its --signal, `signal_s` seconds before its end; None where it
    was neither a preemption nor the time limit (somebody's scancel --signal), or where Slurm does not answer."""
    try:
        told = _job_fields(job_id)
    except SlurmError:
        return None
    if told.get("PreemptTime", "None") != "None":
        return "a preemption"
    try:
        left_s = (datetime.fromisoformat(told["EndTime"]) - datetime.now()).total_seconds()
    except ValueError:  # Unknown: no limit
        return None
    return "the time limit" if left_s <= signal_s + _SIGNAL_EARLY_S else None


def hosts_of(node_list: str) -> list[str]:
    """The names that Slurm's short form stands for."""
    return _run("scontrol", "show", "hostnames", node_list).split()


def unusable_nodes(names: Sequence[str]) -> dict[str, str]:
    """Those of the nodes that Slurm starts no jobs on, and its word for each: down, drained. None known where it does
    not answer."""
    try:
        shown = _run("sinfo", "--noheader", "--Node", f"--nodes={','.join(names)}", "--format=%N %T")
    except SlurmError:
        return {}
    states = dict(line.split(maxsplit=1) for line in shown.splitlines())
    return {name: state.rstrip("*") for name, state in states.items() if state.startswith(_UNUSABLE)}


def _job_fields(job_id: str) -> dict[str, str]:
    return dict(re.findall(r"(\S+?)=(\S*)", _run("scontrol", "--oneliner", "show", "job", job_id)))


def _sbatch(*arguments: str) -> str:
    try:
        return _run("sbatch", *arguments)
    except SlurmError as error:
        raise UsageError(str(error)) from error


def _run(*command: str, timeout_s: float = _TIMEOUT_S) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout_s)
    except subprocess.TimeoutExpired as error:
        raise SlurmError(f"{command[0]} did not answer within {timeout_s:g} s") from error
    if done.returncode != 0:
        said = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise SlurmError(said if said.startswith(command[0]) else f"{command[0]}: {said}")
    return done.stdout
