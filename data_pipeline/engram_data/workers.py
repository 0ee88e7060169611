"""Who does the tasks of a build: this process, or others of this machine. `mpi_workers` has those of other machines."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Protocol, Self

from engram_data.errors import CorpusError

POLL_S = 0.01


class Workers(Protocol):
    """Does tasks; a failure of one ends all."""

    def run[Task, Result](self, function: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[Result]:
        """`function(task)` of every task, in the order in which they are done.

        Raises the `CorpusError` that a task raised, or one that names the worker that died; RuntimeError with the
        traceback of any other exception.
        """
        ...


class ThisProcess:
    """Does the tasks here, one after another; the tokenizer has its threads."""

    def run[Task, Result](self, function: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[Result]:
        """See `Workers`."""
        yield from map(function, tasks)


class Channel(Protocol):
    """The way to one worker that serves tasks."""

    def send(self, message: tuple[Callable[[Any], Any], Any]) -> None:
        """Give a worker that has nothing to do (function, task)."""
        ...

    def poll(self) -> bool:
        """Whether `receive` has an answer. Raises `CorpusError` where the worker has died."""
        ...

    def receive(self) -> tuple[str, Any]:
        """What `attempt` returned."""
        ...


def attempt(function: Callable[[Any], Any], task: Any) -> tuple[str, Any]:
    """("done", result), ("refused", message of a `CorpusError`) or ("failed", traceback)."""
    try:
        return "done", function(task)
    except CorpusError as error:
        return "refused", str(error)
    except Exception:
        return "failed", traceback.format_exc()


def run_over[Task, Result](
    channels: Sequence[Channel], function: Callable[[Task], Result], tasks: Iterable[Task]
) -> Iterator[Result]:
    """`Workers.run` by those behind `channels`: whoever is free takes the next task."""
    waiting = deque(tasks)
    free = list(channels)
    while waiting or len(free) < len(channels):
        while waiting and free:
            free.pop().send((function, waiting.popleft()))
        answered = [channel for channel in channels if channel.poll()]
        for channel in answered:
            kind, value = channel.receive()
            if kind == "refused":
                raise CorpusError(value)
            if kind == "failed":
                raise RuntimeError(f"a worker failed:\n{value}")
            free.append(channel)
            yield value
        if not answered:
            time.sleep(POLL_S)


class ProcessChannel:
    """A process that this one starts, and that does not outlive it."""

    def __init__(self, threads: int) -> None:
        context = multiprocessing.get_context("spawn")  # the tokenizer's threads do not survive a fork
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, threads), daemon=True)
        self._process.start()
        theirs.close()

    def send(self, message: tuple[Callable[[Any], Any], Any]) -> None:
        """See `Channel`."""
        try:
            self._connection.send(message)
        except OSError:
            raise self._death() from None

    def poll(self) -> bool:
        """See `Channel`."""
        if self._connection.poll():
            return True
        if not self._process.is_alive():
            raise self._death()
        return False

    def receive(self) -> tuple[str, Any]:
        """See `Channel`."""
        try:
            answer: tuple[str, Any] = self._connection.recv()
        except (EOFError, OSError):
            raise self._death() from None
        return answer

    def end(self) -> None:
        """Kill the process, whatever it does."""
        self._process.kill()
        self._process.join()
        self._connection.close()

    def _death(self) -> CorpusError:
        self._process.join()
        code = self._process.exitcode
        assert code is not None
        if code >= 0:
            return CorpusError(f"worker process {self._process.pid} ended with exit code {code}")
        name = signal.Signals(-code).name
        reason = " (the machine may be short of memory: give fewer --workers)" if name == "SIGKILL" else ""
        return CorpusError(f"worker process {self._process.pid} was ended by {name}{reason}")


class ProcessWorkers:
    """`with ProcessWorkers(4, threads=1) as workers`: processes of this machine, each with a tokenizer of `threads`."""

    def __init__(self, num_processes: int, threads: int) -> None:
        self._num_processes, self._threads = num_processes, threads
        self._channels: list[ProcessChannel] = []

    def __enter__(self) -> Self:
        try:
            for _ in range(self._num_processes):
                self._channels.append(ProcessChannel(self._threads))
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def run[Task, Result](self, function: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[Result]:
        """See `Workers`."""
        return run_over(self._channels, function, tasks)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for channel in self._channels:
            channel.end()


def _serve(connection: Connection, threads: int) -> None:
    """The life of a worker process."""
    # A terminal or Slurm signals all processes of a build; the first one decides, and ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.environ["RAYON_NUM_THREADS"] = str(threads)  # how the tokenizers library takes it
    threading.Thread(target=_end_with_parent, daemon=True).start()
    while True:
        try:
            function, task = connection.recv()
        except EOFError:
            return
        connection.send(attempt(function, task))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
