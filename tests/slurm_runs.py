"""Runs that are submitted to a cluster by slurm/submit.py, as a user does it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from slurm_cluster import Cluster, wait_until
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_run import TINY, backbone, metrics, tables, train_losses

from engram_megatron.jobs.events import Event, read_events
from engram_megatron.jobs.stacks import ranks_here


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

    def wait_until_it_trains(self, start: int) -> None:
        """In its `start`-th start, counted from 1: what `step` says is of that one then."""
        log, started = self.path / "metrics.jsonl", self.wait_for_event("started", start)
        self.wait_until(lambda: log.exists() and log.stat().st_mtime > started.time, f"steps of start {start}")

    def wait_for_step(self, step: int) -> None:
        self.wait_until(lambda: self.step >= step, f"step {step}")

    def wait_until_finished(self) -> None:
        self.wait_until(lambda: bool(self.events("finished", "gave_up", "stopped")), "the end")
        assert self.events("finished"), self.told()

    def wait_until(self, happened: Callable[[], bool], what: str) -> None:
        """AssertionError, with what the run has told, where it does not happen."""
        wait_until(happened, what, self.told)

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
