"""How long jobs take to train, from the queue and after a fault; on a local cluster, whose nodes share a clock."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from engram_megatron.benchmarks.cluster_run import NODES, RANKS_PER_NODE, ClusterRun, seconds_by_hand, seconds_of
from engram_megatron.benchmarks.limits import Limited
from engram_megatron.jobs.stacks import ranks_here
from engram_megatron.local_cluster import cluster
from engram_megatron.local_cluster.settings import ClusterSettings
from engram_megatron.local_cluster.slurm_client import client_environment
from engram_megatron.training.stop_signal import STOP_FILE

START_RATIO = 2.5  # times torchrun by hand
RESTART_S = 60.0
DRY_RUN_S = 5.0
CHECKPOINT_EVERY = 5
_ENDLESS = (f"training.num_steps={10**6}", f"checkpoint.every_steps={CHECKPOINT_EVERY}")
_SHORT = ("training.num_steps=4", "optimizer.warmup_steps=2")
# What comes between two events, on the way from the queue to the first step.
_PHASES = (
    ("submit.py", "began", "returned"),
    ("the queue, and the start of run_job.py", "returned", "allocated"),
    ("the nodes' preflight", "allocated", "preflight"),
    ("the ranks' start", "started", "first step"),
)


def starts(settings: ClusterSettings, folder: Path, corpus: Path, repeats: int) -> Iterator[Limited]:
    """Submit to first step, and the same command by hand, in turns; medians, and where the former goes."""
    by_slurm, by_hand = [], []
    for turn in range(repeats):
        submitted = ClusterRun(settings, folder / f"submitted_{turn}", corpus)
        ours = [] if turn % 2 else [_times_of_a_start(submitted)]
        hand = ClusterRun(settings, folder / f"hand_{turn}", corpus)
        command = hand.command("launch/train.py", f"--nproc-per-node={NODES * RANKS_PER_NODE}", *_SHORT)
        by_hand.append(seconds_by_hand(command, folder / f"hand_{turn}.log"))
        by_slurm += ours or [_times_of_a_start(submitted)]
    hand_s = statistics.median(by_hand)
    whole = statistics.median(times["first step"] - times["began"] for times in by_slurm)
    yield Limited(f"submit to first step; limit {START_RATIO:g} x by hand", whole, START_RATIO * hand_s)
    for name, since, until in _PHASES:
        yield Limited(f"  of it {name}", statistics.median(times[until] - times[since] for times in by_slurm))
    yield Limited("launch/train.py by hand to first step", hand_s)


def _times_of_a_start(started: ClusterRun) -> dict[str, float]:
    times = {"began": time.time()}
    started.submit(*_SHORT)
    times["returned"] = time.time()
    times["first step"] = started.wait_for_steps(1)
    started.wait_for_end()
    return times | {event.kind: event.time for event in started.events("allocated", "preflight", "started")}


def dry_run(settings: ClusterSettings, folder: Path, corpus: Path, repeats: int) -> Iterator[Limited]:
    """Of submit.py, which queues nothing."""
    command = ClusterRun(settings, folder / "dry", corpus).submit_command("--dry-run")
    wall_s, processor_s = seconds_of(command, client_environment(settings), repeats)
    yield Limited("submit.py --dry-run", wall_s, DRY_RUN_S)
    yield Limited("  on a processor", processor_s, DRY_RUN_S)


def faults(settings: ClusterSettings, folder: Path, corpus: Path, repeats: int) -> Iterator[Limited]:
    """Of one run: a rank is killed `repeats` times, then a node switched off; to the first step of the next start."""
    disturbed = ClusterRun(settings, folder / "disturbed", corpus)
    job = disturbed.submit(*_ENDLESS)
    try:
        seconds = [_seconds_after_a_kill(disturbed, turn + 1) for turn in range(repeats)]
        yield Limited("a rank is killed, to first step", statistics.median(seconds), RESTART_S)
        disturbed.wait_for_steps(repeats + 1, CHECKPOINT_EVERY + 2)
        node = disturbed.events("started")[-1].fields["nodes"][1]
        switched_off = time.time()
        cluster.crash(settings, node)
        first = disturbed.wait_for_steps(repeats + 2)
        started = last_start((settings.logs / "slurmctld.log").read_text(), job)
        yield Limited("a node is switched off, to first step, from Slurm's new start", first - started, RESTART_S)
        yield Limited("  before it: Slurm notices, and starts the job elsewhere", started - switched_off)
    finally:
        (disturbed.path / STOP_FILE).touch()
    disturbed.wait_for_end()


def _seconds_after_a_kill(disturbed: ClusterRun, start: int) -> float:
    """A checkpoint was written since the `start`-th start; the kill to the first step of the next."""
    disturbed.wait_for_steps(start, CHECKPOINT_EVERY + 2)
    killed = time.time()
    ranks_here(disturbed.path)[1].kill()
    return disturbed.wait_for_steps(start + 1) - killed


def last_start(log: str, job: str) -> float:
    """Unix time at which slurmctld, whose log it is, last gave nodes to `job`.

    Raises `ValueError` where it never did.
    """
    line = rf"^\[(\S+)\] (?:sched: Allocate|sched/backfill: _start_job: Started) JobId={job} "
    found = re.findall(line, log, re.MULTILINE)
    if not found:
        raise ValueError(f"slurmctld's log does not say that job {job} was started")
    return datetime.fromisoformat(found[-1]).timestamp()
