"""Runs that are submitted to a cluster by slurm/submit.py, as a user does it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
from tiny_run import TINY, metrics

from engram_megatron.jobs.events import Event, read_events
from engram_megatron.jobs.stacks import ranks_here
from engram_megatron.local_cluster import cluster
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

    def crash(self, node: str) -> None:
        cluster.crash(self.settings, node)

    def boot(self, node: str) -> None:
        """Switch `node` on, and wait until it takes jobs."""
        cluster.boot(self.settings, node)
        _wait_until(lambda: self.command("sinfo", "-hn", node, "-o%t").split()[0] in ("idle", "mix"), f"{node} idle")

    def kill_slurmd(self, node: str) -> None:
        for process in psutil.process_iter():
            is_nodes = process.name() == "slurmd" and node in process.cmdline()
            if is_nodes and process.environ().get("SLURM_CONF") == str(self.settings.slurm_conf):  # of this cluster
                process.kill()


@dataclass(frozen=True)
class Run:
    """A submitted run of two nodes."""

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
        _wait_until(lambda: len(self.events(kind)) >= count, f"{count} events {kind}", self.told)
        return self.events(kind)[count - 1]

    def wait_for_step(self, step: int) -> None:
        def reached() -> bool:
            exists = (self.path / "metrics.jsonl").exists()
            return exists and max((line["step"] for line in metrics(self.path)), default=0) >= step

        _wait_until(reached, f"step {step}", self.told)

    def wait_until_finished(self) -> None:
        _wait_until(lambda: bool(self.events("finished", "gave_up", "stopped")), "the end", self.told)
        assert self.events("finished"), self.told()

    def rank(self, number: int) -> psutil.Process:
        return ranks_here(self.path)[number]

    def told(self) -> str:
        """All events, and the ends of its logs."""
        logs = [log.read_text()[-3000:] for log in sorted((self.path / "logs").glob("*.log"))]
        return "\n".join([*map(str, self.events()), *logs])


def _wait_until(happened: Callable[[], bool], what: str, told: Callable[[], str] = lambda: "") -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not happened():
        assert time.monotonic() < deadline, f"{what} did not come within {TIMEOUT_S:g} s\n{told()}"
        time.sleep(0.2)
