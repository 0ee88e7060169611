"""A real Slurm cluster on this machine, for tests: its commands, and what befalls its nodes."""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from engram_megatron.errors import UsageError
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

    def command(self, *words: str, stdin: str | None = None) -> str:
        """Run one of Slurm's commands, or a program of ours; what it prints. AssertionError where it fails."""
        done = self.attempt(*words, stdin=stdin)
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout

    def attempt(self, *words: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            words,
            cwd=ROOT,
            env=client_environment(self.settings),
            input=stdin,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )

    def submit(self, script: str, *options: str) -> str:
        """The id of a job that runs `script`, a shell script."""
        return self.command("sbatch", "--parsable", *options, stdin=f"#!/bin/bash\n{script}\n").strip()

    def inside(self, node: str, *words: str) -> list[str]:
        """The command that runs `words` as root of `node`."""
        return command_inside(self.settings, node, words)

    def crash(self, node: str) -> None:
        cluster.crash(self.settings, node)

    def boot(self, node: str) -> None:
        """Switch `node` on, and wait until it takes jobs."""
        cluster.boot(self.settings, node)
        wait_until(lambda: self.node_state(node) in ("idle", "mix"), f"{node} idle")

    def node_state(self, node: str) -> str:
        return self.command("sinfo", "-hn", node, "-o%t").split()[0].rstrip("*")

    def job_fields(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says, such as JobState, Restarts, NodeList."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.command("scontrol", "--oneliner", "show", "job", job)))

    def job_state(self, job: str) -> str:
        return self.job_fields(job)["JobState"]

    def wait_for_state(self, job: str, states: Collection[str]) -> None:
        """Until the job is in one of `states`."""
        wait_until(lambda: self.job_state(job) in states, f"job {job} in {states}", lambda: self.job_state(job))

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
        wait_until(lambda: all(s in states for s in self.command("sinfo", "-hN", "-o%T").split()), "all nodes idle")

    def wait_until_ended(self, job: str) -> None:
        wait_until(lambda: not self.command("squeue", "-h", f"--jobs={job}"), f"the end of job {job}")

    def kill_slurmd(self, node: str) -> None:
        for process in psutil.process_iter():
            is_nodes = process.name() == "slurmd" and node in process.cmdline()
            if is_nodes and process.environ().get("SLURM_CONF") == str(self.settings.slurm_conf):  # of this cluster
                process.kill()


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


def wait_until(happened: Callable[[], bool], what: str, told: Callable[[], str] = lambda: "") -> None:
    """AssertionError, with what `told` says, where it does not happen in time."""
    deadline = time.monotonic() + TIMEOUT_S
    while not happened():
        assert time.monotonic() < deadline, f"{what} did not come within {TIMEOUT_S:g} s\n{told()}"
        time.sleep(0.2)
