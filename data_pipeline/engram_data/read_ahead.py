"""Batches read and decoded before they are asked for, in a thread beside training."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from engram_data.batch import Batch

DEPTH = 2  # steps; a step's batches of one rank take 21 bytes a token
_LOOK_S = 0.1
_END_S = 5.0  # for a read that hangs, of a file system that is gone: the process may end all the same


class ReadAhead:
    """`with ReadAhead(stream.microbatches, first, stop) as batches: batches.take()` for each step first .. stop - 1.

    Nobody else may use the stream and its corpus meanwhile.
    """

    def __init__(self, read: Callable[[int], list[Batch]], first: int, stop: int, depth: int = DEPTH) -> None:
        """`read(step)` gives the batches of a step; at most `depth` steps are kept, and one is being read."""
        assert depth > 0, depth
        self._read, self._left = read, stop - first
        self._ready: queue.Queue[list[Batch] | Exception] = queue.Queue(depth)
        self._ended = threading.Event()
        self._wait_s = 0.0
        self._thread = threading.Thread(target=self._run, args=[range(first, stop)], name="read-ahead", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def take(self) -> Sequence[Batch] | None:
        """The batches of the next step; None after the last one. Raises what reading them raised."""
        if self._left <= 0:
            return None
        self._left -= 1
        started = time.perf_counter()
        found = self._ready.get()
        self._wait_s += time.perf_counter() - started
        if isinstance(found, Exception):
            raise found
        return found

    def waited_s(self) -> float:
        """Seconds that `take` has waited since the last call of this."""
        waited, self._wait_s = self._wait_s, 0.0
        return waited

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join(_END_S)

    def _run(self, steps: range) -> None:
        for step in steps:
            try:
                found: list[Batch] | Exception = self._read(step)
            except Exception as error:  # of any kind: the thread that takes it raises it
                found = error
            if not self._put(found) or isinstance(found, Exception):
                return

    def _put(self, found: list[Batch] | Exception) -> bool:
        """Whether there was room for it before the end."""
        while not self._ended.is_set():
            try:
                self._ready.put(found, timeout=_LOOK_S)
                return True
            except queue.Full:
                continue
        return False
