"""A small run that a benchmark starts, by Slurm or by hand, and the times at which it gets somewhere.

Its log is looked at every `LOOK_S`: in it the supervisor's events and the lines of rank 0's steps stand in order.
"""

from __future__ import annotations

import contextlib
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from engram_megatron.jobs.events import Event, read_events
from engram_megatron.local_cluster.settings import ClusterSettings
from engram_megatron.local_cluster.slurm_client import client_environment

ROOT = Path(__file__).parents[2]
LOOK_S = 0.02
PATIENCE_S = 600.0
NODES, RANKS_PER_NODE = 2, 2
# engram_tiny on four ranks; what comes before its first step is as short as it may be.
MODEL = (
    *("engram_tiny", "model.vocab_size=1024", "parallel.expert=2", "training.micro_batch_size=2"),
    *("training.validation_batches=1", "training.validate_every_steps=0", "training.log_every_steps=1"),
)
_STEP = re.compile(r"^(?:\d+: )?step +\d+/\d+ \| loss", re.MULTILINE)
_STARTED = '{"event": "started"'


class BenchmarkError(RuntimeError):
    """A run did not get where it should; with the end of its log."""


@dataclass(frozen=True)
class ClusterRun:
    """In folder `path`, which does not exist at first; trained on `corpus`."""

    settings: ClusterSettings
    path: Path
    corpus: Path

    def command(self, program: str, *words: str) -> list[str]:
        return [sys.executable, program, *MODEL, f"run_dir={self.path}", f"data.corpus={self.corpus}", *words]

    def submit_command(self, *words: str) -> list[str]:
        job = (f"--nodes={NODES}", f"--ranks-per-node={RANKS_PER_NODE}", "--time=1:00:00", "--memory=100")
        return self.command("slurm/submit.py", *job, *words)

    def submit(self, *words: str) -> str:
        """The job's id."""
        return run(self.submit_command(*words), client_environment(self.settings)).split()[1]

    def log(self) -> str:
        return "".join(file.read_text() for file in sorted((self.path / "logs").glob("*.log")))

    def wait_for_steps(self, start: int, count: int = 1) -> float:
        """Unix time at which the `start`-th start of its ranks had logged `count` steps."""

        def there() -> bool:
            of_starts = self.log().split(_STARTED)[1:]
            return len(of_starts) >= start and len(_STEP.findall(of_starts[start - 1])) >= count

        return wait(there, f"{count} steps of start {start} of {self.path}", self.log)

    def wait_for_end(self) -> None:
        wait(lambda: bool(self.events("finished", "gave_up", "stopped")), f"the end of {self.path}", self.log)

    def events(self, *kinds: str) -> list[Event]:
        return [event for event in read_events(self.path) if event.kind in kinds]


def seconds_by_hand(command: Sequence[str], log: Path) -> float:
    """From the start of `command`, launch/train.py, to its first step. Returns when it has ended."""
    with log.open("w") as output:
        began = time.time()
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
        try:
            first = wait(lambda: _STEP.search(log.read_text()) is not None, "the first step", log.read_text)
            process.wait(PATIENCE_S)
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
    return first - began


def run(command: Sequence[str], environment: Mapping[str, str]) -> str:
    """What `command` prints. Raises `BenchmarkError` where it fails."""
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BenchmarkError(f"{' '.join(command[:3])} failed: {done.stdout}{done.stderr}")
    return done.stdout


def seconds_of(command: Sequence[str], environment: Mapping[str, str], repeats: int) -> tuple[float, float]:
    """Median seconds of `command` from start to end, and on a processor."""
    wall, processor = [], []
    for _ in range(repeats):
        began, before = time.perf_counter(), _processor_s()
        run(command, environment)
        wall.append(time.perf_counter() - began)
        processor.append(_processor_s() - before)
    return statistics.median(wall), statistics.median(processor)


def _processor_s() -> float:
    """Of all children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def wait(happened: Callable[[], bool], what: str, told: Callable[[], str]) -> float:
    """Unix time at which it had happened. Raises `BenchmarkError` where that takes more than `PATIENCE_S`."""
    deadline = time.monotonic() + PATIENCE_S
    while not happened():
        if time.monotonic() > deadline:
            raise BenchmarkError(f"{what} did not come within {PATIENCE_S:g} s: {told()[-3000:]}")
        time.sleep(LOOK_S)
    return time.time()
