"""The thread that drives the tables beside the model: planning, fetching, returning, updating, one after another.

All its collectives run in the order in which tasks are given to it, which is the same on every rank, on groups that
nothing else uses.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numba

Result = TypeVar("Result")


class Worker:
    """Runs tasks one after another, beside the caller or, if not `beside`, at once and in place.

    After a task has failed no other one runs, since it may be a collective: each `result()` raises that first error.
    `on_failure` is called with it as it happens: a rank whose model waits for another one would not come to ask.
    """

    def __init__(self, *, beside: bool, on_failure: Callable[[BaseException], None] | None = None) -> None:
        self.on_failure = on_failure
        self._executor = _executor() if beside else None
        self._failure: BaseException | None = None
        self._seconds: dict[str, float] = defaultdict(float)

    def submit(self, name: str, task: Callable[[], Result]) -> Future[Result]:
        """Run `task` when all tasks before it are done; `seconds` counts its time under `name`."""
        if self._executor is not None:
            return self._executor.submit(self._run, name, task)
        future: Future[Result] = Future()
        try:
            future.set_result(self._run(name, task))
        except BaseException as error:
            future.set_exception(error)
        return future

    def finish(self) -> None:
        """Wait for all tasks; raises the error of the first that failed."""
        self.submit("finish", lambda: None).result()

    def close(self) -> None:
        """Wait for the running task and end the thread."""
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)

    def take_seconds(self) -> dict[str, float]:
        """Time that tasks have taken since the last call, by name."""
        taken, self._seconds = self._seconds, defaultdict(float)
        return dict(taken)

    def _run(self, name: str, task: Callable[[], Result]) -> Result:
        if self._failure is not None:
            raise self._failure
        started = time.perf_counter()
        try:
            return task()
        except BaseException as error:
            self._failure = error
            if self.on_failure is not None:
                self.on_failure(error)
            raise
        finally:
            self._seconds[name] += time.perf_counter() - started


def _executor() -> ThreadPoolExecutor:
    # numba's limit is each thread's own: a new one would take all cores, also those of the other ranks of this host.
    return ThreadPoolExecutor(
        1, thread_name_prefix="tables", initializer=numba.set_num_threads, initargs=(numba.get_num_threads(),)
    )
