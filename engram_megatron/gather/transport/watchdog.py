"""A deadline for calls that cannot be given one."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator


class Watchdog:
    """Ends the process when a blocking call takes longer than `timeout_s` seconds, with a line that says which.

    MPI knows no timeouts, and a thread inside it cannot be made to raise. Polling a non-blocking call instead would
    cost bandwidth: MPI moves data only while it is called, and every look would wait for Python's lock.

    `on_expiry(line)` is called in the watching thread; the default writes the line to stderr and leaves with code 1,
    upon which mpirun or srun ends the other ranks.
    """

    def __init__(self, timeout_s: float, on_expiry: Callable[[str], None] | None = None) -> None:
        self.timeout_s = timeout_s
        self._on_expiry = on_expiry if on_expiry is not None else _leave
        self._lock = threading.Lock()
        self._current: tuple[float, str] | None = None  # (deadline, what is waited for)
        self._thread: threading.Thread | None = None

    @contextlib.contextmanager
    def watch(self, waiting_for: str) -> Iterator[None]:
        """The block must end in time. One block at a time."""
        with self._lock:
            assert self._current is None, self._current
            self._current = (time.monotonic() + self.timeout_s, waiting_for)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="transport-watchdog", daemon=True)
            self._thread.start()
        try:
            yield
        finally:
            with self._lock:
                self._current = None

    def _run(self) -> None:
        # Nobody wakes this thread: a block that begins while it sleeps has its deadline after the next look.
        while True:
            with self._lock:
                current = self._current
            remaining = self.timeout_s if current is None else current[0] - time.monotonic()
            if current is not None and remaining <= 0:
                self._on_expiry(f"{current[1]} did not end in {self.timeout_s:g} s")
                return
            time.sleep(remaining)


def _leave(line: str) -> None:
    print(f"error: {line}", file=sys.stderr, flush=True)
    os._exit(1)
