"""MPI ranks as the workers of a build. Rank 0 hands out the work, and a process that it starts takes its share."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any, Self

from engram_data.workers import POLL_S, Channel, ProcessChannel, attempt, run_over


class _RankChannel:
    """Another rank, which is in `serve_rank`. A rank that dies is the launcher's to notice: it ends the others."""

    def __init__(self, communicator: Any, rank: int) -> None:
        self._communicator, self._rank = communicator, rank

    def send(self, message: tuple[Callable[[Any], Any], Any]) -> None:
        self._communicator.send(message, dest=self._rank)

    def poll(self) -> bool:
        return bool(self._communicator.iprobe(source=self._rank))

    def receive(self) -> tuple[str, Any]:
        answer: tuple[str, Any] = self._communicator.recv(source=self._rank)
        return answer


class MpiWorkers:
    """`with MpiWorkers(MPI.COMM_WORLD, threads=1) as workers` on rank 0, while the others are in `serve_rank`.

    Left without an error it sends the others home; with one, the caller has to end them (`Abort`).
    """

    def __init__(self, communicator: Any, threads: int) -> None:
        self._communicator, self._threads = communicator, threads

    def __enter__(self) -> Self:
        self._own = ProcessChannel(self._threads)
        others = [_RankChannel(self._communicator, rank) for rank in range(1, self._communicator.Get_size())]
        self._channels: list[Channel] = [*others, self._own]
        return self

    def run[Task, Result](self, function: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[Result]:
        """See `Workers`."""
        return run_over(self._channels, function, tasks)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._own.end()
        if error is None:
            for rank in range(1, self._communicator.Get_size()):
                self._communicator.send(None, dest=rank)


def serve_rank(communicator: Any) -> None:
    """Do what rank 0 sends until it has no more."""
    while True:
        while not communicator.iprobe(source=0):
            time.sleep(POLL_S)  # a blocking receive would keep a core busy
        message = communicator.recv(source=0)
        if message is None:
            return
        communicator.send(attempt(*message), dest=0)
