"""Signs of life: a small file per rank, `heartbeats/rank_00012.json` in the run folder, written by a thread of its own.

The thread writes while the training thread waits, so a rank that waits for others (fresh `time`, old `progress_time`)
is told from one that is stopped or gone (old `time`). All times are those of the rank's host.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import psutil

from engram_megatron.tables.host_memory import available_bytes

HEARTBEATS = "heartbeats"
MEAN_OF_STEPS = 20
SECONDS_TO_CLOSE = 5.0

Phase = Literal["starting", "loading", "training", "validating", "saving", "ended"]


@dataclass(frozen=True, kw_only=True)
class Beat:
    """What a rank said last. Times in Unix seconds. The seconds per step are means over its last `MEAN_OF_STEPS` steps,
    0 before the first: of the whole step, of its wait for rows, and of its own forward and backward, which are what
    tells a slow rank from those that wait for it."""

    rank: int
    host: str
    pid: int
    time: float
    progress_time: float
    step: int
    phase: Phase
    step_s: float
    gather_wait_s: float
    compute_s: float
    rss_bytes: int  # resident memory of the process; shared pages count in each
    available_bytes: int  # what the host, or the process's cgroup, has left
    device_bytes: int  # memory that the process holds of its GPU


class Heartbeat:
    """Writes the beats of this rank while the block is entered, at most every `interval_s` seconds; 0: none.

    It never fails a run: a beat that cannot be written is dropped, as are all while the folder `heartbeats` does not
    exist, which this does not make. The end of the block without an exception is the phase "ended".
    """

    def __init__(
        self, run_dir: str | Path, rank: int, interval_s: float, *, device_bytes: Callable[[], int] = lambda: 0
    ) -> None:
        self.rank, self.interval_s, self.device_bytes = rank, interval_s, device_bytes
        self.file = beat_file(Path(run_dir), rank)
        self._progress: tuple[float, int, Phase] = (time.time(), 0, "starting")
        self._steps: deque[tuple[float, float, float]] = deque(maxlen=MEAN_OF_STEPS)
        self._process = psutil.Process()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        if self.interval_s > 0:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_exception: object) -> None:
        if kind is None:
            self.progress(self._progress[1], "ended")
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join(SECONDS_TO_CLOSE)  # a file system that hangs does not keep the run from ending

    def progress(self, step: int, phase: Phase) -> None:
        """The training thread goes on: `step` updates are done, and `phase` begins or continues."""
        self._progress = (time.time(), step, phase)

    def stepped(self, step: int, step_s: float, gather_wait_s: float, compute_s: float) -> None:
        """`progress` after a step that took these seconds (see `Beat`)."""
        self._steps.append((step_s, gather_wait_s, compute_s))
        self.progress(step, "training")

    def _run(self) -> None:
        while not self._closing.is_set():
            self._write()
            self._closing.wait(self.interval_s)
        self._write()

    def _write(self) -> None:
        temporary = self.file.with_suffix(".partial")
        with contextlib.suppress(OSError):
            temporary.write_text(json.dumps(asdict(self._beat())))
            temporary.replace(self.file)

    def _beat(self) -> Beat:
        progress_time, step, phase = self._progress
        steps = list(self._steps)
        step_s, gather_wait_s, compute_s = (
            (sum(s) / len(steps) for s in zip(*steps, strict=True)) if steps else (0.0,) * 3
        )
        return Beat(
            rank=self.rank,
            host=socket.gethostname(),
            pid=os.getpid(),
            time=time.time(),
            progress_time=progress_time,
            step=step,
            phase=phase,
            step_s=step_s,
            gather_wait_s=gather_wait_s,
            compute_s=compute_s,
            rss_bytes=self._process.memory_info().rss,
            available_bytes=available_bytes(),
            device_bytes=self.device_bytes(),
        )


def beat_file(run_dir: Path, rank: int) -> Path:
    return run_dir / HEARTBEATS / f"rank_{rank:05d}.json"


def read_heartbeats(run_dir: Path) -> list[Beat]:
    """The last beats of all ranks that have written any, by rank."""
    beats = []
    for file in sorted((run_dir / HEARTBEATS).glob("rank_*.json")):
        with contextlib.suppress(OSError, ValueError, TypeError):  # removed meanwhile, or of another version
            beats.append(Beat(**json.loads(file.read_bytes())))
    return beats


def remove_beats_of_others(run_dir: Path, num_ranks: int) -> None:
    """Remove what ranks from `num_ranks` on left behind: those of a start with more of them."""
    for file in (run_dir / HEARTBEATS).glob("rank_*"):
        number = file.name.removeprefix("rank_").partition(".")[0]
        if not number.isdigit() or int(number) >= num_ranks:
            file.unlink(missing_ok=True)
