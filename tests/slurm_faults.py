"""What can befall a run of two nodes: each fault as a function, done for real on the cluster, and undone."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from slurm_cluster import Cluster
from slurm_runs import Run


@dataclass(frozen=True)
class Fault:
    """`strike` returns when the run has been started again, or is about to be. `told`: what the run's events say."""

    name: str
    strike: Callable[[Cluster, Run], None]
    told: str


def _kill_rank(_cluster: Cluster, run: Run) -> None:
    run.rank(1).kill()


def _stop_rank(_cluster: Cluster, run: Run) -> None:
    os.kill(run.rank(1).pid, signal.SIGSTOP)


def _signal(cluster: Cluster, run: Run) -> None:
    cluster.command("scancel", "--signal=USR1", run.job)


def _near_time_limit(cluster: Cluster, run: Run) -> None:
    requeues = len(run.events("requeued"))
    with _held(run):  # Slurm looks at limits every half minute
        cluster.command("scontrol", "update", f"JobId={run.job}", "TimeLimit=2")
        run.wait_until((run.path / "STOP").exists, "the signal before the time limit")
    run.wait_for_event("requeued", requeues + 1)
    cluster.command("scontrol", "update", f"JobId={run.job}", "TimeLimit=120")


def _preempt(cluster: Cluster, _run: Run) -> None:
    cluster.command("srun", "--partition=urgent", f"--nodes={len(cluster.settings.nodes)}", "--exclusive", "sleep", "1")


def _kill_slurmd(cluster: Cluster, run: Run) -> None:
    node = run.events("started")[-1].fields["nodes"][1]
    starts = len(run.events("started"))
    with _held(run):
        cluster.kill_slurmd(node)
        run.wait_until(lambda: cluster.job_state(run.job) != "RUNNING", "Slurm missing a node without slurmd")
    run.wait_for_event("started", starts + 1)


@contextmanager
def _held(run: Run) -> Iterator[None]:
    """The tiny run would come to its end before Slurm misses a slurmd: it stands in a step until then."""
    rank = run.rank(0)
    rank.suspend()
    yield
    if rank.is_running():
        rank.resume()


def _power_off(cluster: Cluster, run: Run, number: int) -> None:
    starts = len(run.events("started"))
    cluster.crash(run.events("started")[-1].fields["nodes"][number])
    run.wait_for_event("started", starts + 1)


def _power_off_node(cluster: Cluster, run: Run) -> None:
    _power_off(cluster, run, 1)


def _power_off_head_node(cluster: Cluster, run: Run) -> None:
    _power_off(cluster, run, 0)


FAULTS = [
    Fault("a rank is killed", _kill_rank, "was ended by SIGKILL"),
    Fault("a rank hangs", _stop_rank, "no progress for "),
    Fault("signal", _signal, "stopped by SIGUSR1"),
    Fault("the time limit nears", _near_time_limit, "stopped by the time limit"),
    Fault("preemption", _preempt, "stopped by a preemption"),
    Fault("a slurmd is killed", _kill_slurmd, " is down"),
    Fault("a node is powered off", _power_off_node, " is down"),
    Fault("the head node is powered off", _power_off_head_node, " is down"),
]
