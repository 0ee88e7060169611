"""SIGTERM, SIGINT and SIGUSR1 ask for a checkpoint and an orderly end; a file in the run folder does too."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any

STOP_FILE = "STOP"
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_ECHO_S = 2.0


class FirstSignal:
    """Tells a second signal, of somebody who does not want to wait, from an echo of the first: `scancel --signal`
    reaches launchers and ranks, and launchers pass it on to ranks, which have it already."""

    def __init__(self) -> None:
        self._came: float | None = None

    def is_followed(self) -> bool:
        """Call for each signal, in its handler: whether it is a second one."""
        now = time.monotonic()
        if self._came is None:
            self._came = now
        return now - self._came > _ECHO_S


class StopSignal:
    """Remembers that a stop was asked for. The trainer reads it between steps and lets all ranks agree.

    A signal that comes while Python imports or sits in a long collective is not lost: the handler only sets a flag.
    `launch_ranks` starts ranks with these signals blocked, so that none comes before the handler stands.
    The stop file (`run_dir/STOP`) serves where signals do not reach the ranks; it is removed by the run that obeys it.
    """

    def __init__(self, run_dir: Path, *, watch_file: bool = True) -> None:
        """`watch_file` on one rank is enough, and spares a shared file system a look of every rank in every step."""
        self.stop_file = run_dir / STOP_FILE
        self.watch_file = watch_file
        self.received: str | None = None
        self._first = FirstSignal()
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        for number in STOP_SIGNALS:
            self._previous[number] = signal.signal(number, self._receive)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        return self

    def __exit__(self, *_exception: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if self._first.is_followed():
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.received = self.received or signal.Signals(number).name

    def reason(self) -> str | None:
        """Why this rank wants to stop, or None."""
        if self.received is None and self.watch_file and self.stop_file.exists():
            return f"file {STOP_FILE}"
        return self.received
