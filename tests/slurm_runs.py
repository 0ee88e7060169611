"""Runs that are submitted to a cluster by slurm/submit.py, as a user does it."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_run import TINY, backbone, metrics, tables, train_losses

from engram_megatron.errors import UsageError
from engram_megatron.jobs.events import Event, read_events
from engram_megatron.jobs.stacks import ranks_here
from engram_megatron.local_cluster import cluster
from engram_megatron.local_cluster.machine import command_inside
from engram_megatron.local_cluster.settings import ClusterSettings
from engram_megatron.local_cluster.slurm_client import client_environment

ROOT = Path(__file__).parents[1]
TIMEOUT_S = 240.0


@dataclass(frozen=True)
class Cluster:
    """What a user at its login node can do, and what befalls its nodes."""

    settings: ClusterSettings

    def command(self, *words: str) -> str:
        """Run one of Slurm's commands, or a program of ours; what it prints. AssertionError where it fails."""
        done = self.attempt(*words)
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout

    def attempt(self, *words: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, **client_environment(self.settings)}
        return subprocess.run(
            words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=120
        )

    def inside(self, node: str, *words: str) -> list[str]:
        """The command that runs `words` as root of `node`."""
        return command_inside(self.settings, node, words)

    def crash(self, node: str) -> None:
        cluster.crash(self.settings, node)

    def boot(self, node: str) -> None:
        """Switch `node` on, and wait until it takes jobs."""
        cluster.boot(self.settings, node)
        _wait_until(lambda: self.node_state(node) in ("idle", "mix"), f"{node} idle")

    def node_state(self, node: str) -> str:
        return self.command("sinfo", "-hn", node, "-o%t").split()[0].rstrip("*")

    def job_state(self, job: str) -> str:
        """In Slurm's words, such as RUNNING."""
        return self.command("scontrol", "show", "job", job).partition("JobState=")[2].split()[0]

    def mend(self) -> None:
        """Boot all nodes that are off or have no slurmd, so that the next test finds a whole cluster."""
        for state in cluster.states(self.settings):
            if state.is_on and state.slurm.startswith("down"):
                self.crash(state.node.name)
            if not state.is_on or state.slurm.startswith("down"):
                self.boot(state.node.name)

    def wait_until_idle(self) -> None:
        """Until a job could have all nodes that are on: those of one that has ended are not free at once."""
        states = ("idle", "down", "down*")
        _wait_until(lambda: all(s in states for s in self.command("sinfo", "-hN", "-o%T").split()), "all nodes idle")

    def wait_until_ended(self, job: str) -> None:
        _wait_until(lambda: not self.command("squeue", "-h", f"--jobs={job}"), f"the end of job {job}")

    def kill_slurmd(self, node: str) -> None:
        for process in psutil.process_iter():
            is_nodes = process.name() == "slurmd" and node in process.cmdline()
            if is_nodes and process.environ().get("SLURM_CONF") == str(self.settings.slurm_conf):  # of this cluster
                process.kill()


@dataclass(frozen=True)
class Run:
    """A submitted run, of two nodes if nothing else is said."""

    cluster: Cluster
    path: Path

    def submit(self, corpus: Path, *words: str) -> str:
        """Returns the id of its first job."""
        return self.try_to_submit(corpus, *words).split()[1]

    def try_to_submit(self, corpus: Path, *words: str, code: int = 0) -> str:
        """What slurm/submit.py prints, of an exit with `code`."""
        command = [sys.executable, "slurm/submit.py", "engram_tiny", "--nodes=2", *TINY]
        command += [f"data.corpus={corpus}", f"run_dir={self.path}", *words]
        done = self.cluster.attempt(*command)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def events(self, *kinds: str) -> list[Event]:
        return [event for event in read_events(self.path) if not kinds or event.kind in kinds]

    def wait_for_event(self, kind: str, count: int = 1) -> Event:
        self.wait_until(lambda: len(self.events(kind)) >= count, f"{count} events {kind}")
        return self.events(kind)[count - 1]

    def wait_for_step(self, step: int) -> None:
        self.wait_until(lambda: self.step >= step, f"step {step}")

    def wait_until_finished(self) -> None:
        self.wait_until(lambda: bool(self.events("finished", "gave_up", "stopped")), "the end")
        assert self.events("finished"), self.told()

    def wait_until(self, happened: Callable[[], bool], what: str) -> None:
        """AssertionError, with what the run has told, where it does not happen."""
        _wait_until(happened, what, self.told)

    @property
    def step(self) -> int:
        """The last that is logged; 0 before there is one."""
        exists = (self.path / "metrics.jsonl").exists()
        return max((line["step"] for line in metrics(self.path)), default=0) if exists else 0

    @property
    def job(self) -> str:
        """The id of the job that trains, or is the next to."""
        known = [event.job.partition(".")[0] for event in self.events() if event.job]
        return known[-1] if known else str(self.events("submitted")[-1].fields["jobs"][0])

    def status(self) -> dict[str, Any]:
        """What slurm/status.py --json says of it."""
        said: dict[str, Any] = json.loads(
            self.cluster.command(sys.executable, "slurm/status.py", str(self.path), "--json")
        )
        return said

    def shown(self) -> str:
        """What a person sees of it, with single spaces."""
        return " ".join(self.cluster.command(sys.executable, "slurm/status.py", str(self.path)).split())

    def rank(self, number: int) -> psutil.Process:
        return ranks_here(self.path)[number]

    def told(self) -> str:
        """All events, and the ends of its logs."""
        logs = [log.read_text()[-3000:] for log in sorted((self.path / "logs").glob("*.log"))]
        return "\n".join([*map(str, self.events()), *logs])


def assert_equal_ends(found: Run, expected: Run) -> None:
    """Bit for bit: losses of all steps, tables and weights of the last checkpoint; and a step is logged once."""
    losses = train_losses(expected.path)
    assert train_losses(found.path) == losses
    board = EventAccumulator(str(found.path / "tensorboard"), size_guidance={"scalars": 0})
    board.Reload()
    assert [event.step for event in board.Scalars("train/loss")] == sorted(losses), "one curve over all starts"
    ours, theirs = (run.path / f"checkpoints/step_{max(losses):08d}" for run in (found, expected))
    for name, values in tables(theirs).items():
        np.testing.assert_array_equal(tables(ours)[name], values, err_msg=name)
    weights, others = backbone(theirs), backbone(ours)
    assert [name for name, tensor in weights.items() if not torch.equal(others[name], tensor)] == []


@contextlib.contextmanager
def cluster_of(nodes: int, *shm_mib: str) -> Iterator[Cluster]:
    """A cluster of nodes of a core each: a rank computes in one thread, as it does on one host. Skips where none can
    be."""
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder:  # a short path: sockets lie below it
        try:
            settings = cluster.up(Path(folder) / "c", nodes, 1, shm_mib, plain=False)
        except UsageError as error:
            pytest.skip(str(error))
        try:
            if not settings.isolated:
                pytest.skip("no namespaces here: nodes would share a name and memory")
            yield Cluster(settings)
        finally:
            cluster.down(Path(folder) / "c")


def _wait_until(happened: Callable[[], bool], what: str, told: Callable[[], str] = lambda: "") -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not happened():
        assert time.monotonic() < deadline, f"{what} did not come within {TIMEOUT_S:g} s\n{told()}"
        time.sleep(0.2)
