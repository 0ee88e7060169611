"""Processes that outlive the program that starts them, and are found again by later ones.

A process is recorded by its id and the time of its start, so that another with a reused id is never taken for it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import psutil

POLL_S = 0.02


@dataclass(frozen=True)
class Process:
    """`start_ticks`: clock ticks from the machine's boot to the start of the process."""

    pid: int
    start_ticks: int

    def is_alive(self) -> bool:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, os.WNOHANG)  # a child of this program stays a zombie until then
        return _start_ticks(self.pid) == self.start_ticks

    def kill(self, signal_number: int = signal.SIGKILL) -> None:
        if self.is_alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal_number)

    def wait_ended(self, timeout_s: float) -> bool:
        deadline = time.monotonic() + timeout_s
        while self.is_alive():
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL_S)
        return True

    def first_child(self) -> Process | None:
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.pid).children():
                return process_of(child.pid)
        return None

    def kill_descendants(self) -> None:
        """Kill all below this process, which must be the one that inherits orphans, so that none can slip away."""
        while self.is_alive():
            below = [found for found in psutil.Process(self.pid).children(recursive=True) if _is_running(found)]
            if not below:
                return
            for found in below:
                with contextlib.suppress(psutil.NoSuchProcess):
                    found.kill()
            time.sleep(POLL_S)


def process_of(pid: int) -> Process | None:
    ticks = _start_ticks(pid)
    return None if ticks is None else Process(pid, ticks)


def start(command: Sequence[str], log: Path, environment: Mapping[str, str], record: Path) -> tuple[Process, IO[bytes]]:
    """Start `command` in a session of its own, with its output appended to `log`, and note it in the file `record`.

    Returns the process and the pipe to its standard input.
    """
    with log.open("ab") as output:
        started = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=output, stderr=output, env=dict(environment), start_new_session=True
        )
    started.returncode = 0  # it may outlive this program: no warning about that
    process = process_of(started.pid)
    assert process is not None, "an unwaited child keeps its entry in /proc"
    record.write_text(f"{process.pid} {process.start_ticks}\n")
    assert started.stdin is not None
    return process, started.stdin


def recorded(record: Path) -> Process | None:
    """The process noted in the file `record`, if it is still running."""
    try:
        pid, ticks = map(int, record.read_text().split())
    except (FileNotFoundError, ValueError):  # none, or its writer was killed
        return None
    process = Process(pid, ticks)
    return process if process.is_alive() else None


def _start_ticks(pid: int) -> int | None:
    """None where the process is gone or waits, dead, for its parent."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def _is_running(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    return False
