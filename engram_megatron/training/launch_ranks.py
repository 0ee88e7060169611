"""The ranks of a host, started by torchrun's agent in this process; stop signals are passed on to them.

torchrun's own command ends workers 30 s after a signal, whether they have saved or not, and answers an orderly stop
with a traceback. Here its agent (`torch.distributed.launcher.api.elastic_launch`) runs in a thread of its own, and this
process's signals go to the ranks, which save as long as that takes and end with 0. Jobs of Slurm start one such process
on every node; with torchrun itself, it starts `launch/train.py` as each rank's program.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

import psutil
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from engram_megatron.training.loss_spike import EXIT_ROLLED_BACK
from engram_megatron.training.stop_signal import FirstSignal

EXIT_USAGE = 2
_TOLD = (EXIT_USAGE, EXIT_ROLLED_BACK)  # the rank itself has said what is to be said
SHOWN_FAILURES = 4
MEET_S = 300  # for all nodes to come
# What each signal to the launcher becomes for the ranks: the hang-up of a terminal is a stop like another.
_FORWARDED = {
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGINT: signal.SIGINT,
    signal.SIGUSR1: signal.SIGUSR1,
    signal.SIGHUP: signal.SIGTERM,
}


@dataclass(frozen=True, kw_only=True)
class Node:
    """One of `num_nodes` hosts with the same number of ranks each, counted from 0. They meet at `address`:`port`, on
    the first one."""

    number: int
    num_nodes: int
    address: str
    port: int


def launch_ranks(command: Sequence[str], num_ranks: int, node: Node | None = None) -> int:
    """Run `command` as `num_ranks` ranks of a job on this host, alone or as one of its nodes, under torchrun's agent
    and wait for all of them.

    They inherit the environment, torchrun's variables, and OMP_NUM_THREADS (cores by ranks) where it is not set. The
    first signal of SIGTERM, SIGINT, SIGUSR1 and SIGHUP goes to every rank, which saves and ends; one that follows two
    seconds later or more ends them at once. Returns the exit code for the launcher: 0 when every rank ended with 0,
    else the code of the rank that failed first (128 + n when signal n ended it), after one line on stderr that names
    the rank. Code 2, a user's mistake, and 3, a rollback, were told by the rank itself.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // num_ranks)))
    agent = _Agent(command, num_ranks, node)
    with _signals_forwarded() as came:
        agent.start()
        while agent.is_alive():
            agent.join(0.2)  # in slices, so that signal handlers of this thread get their turn
    if agent.error is None:
        return 0
    if not isinstance(agent.error, ChildFailedError):
        raise agent.error
    failures = _causes(agent.error)
    code = failures[0][1].exitcode
    if came and code < 0:
        print(f"error: ended by {failures[0][1].signal_name()} without saving", file=sys.stderr)
    elif code not in _TOLD:
        told = "; ".join(_in_words(rank, failure) for rank, failure in failures[:SHOWN_FAILURES])
        print(f"error: {told}; all ranks of this host were ended", file=sys.stderr)
    return code if code >= 0 else 128 - code


class _Agent(threading.Thread):
    """torchrun's agent. Its thread has stop signals blocked, and the ranks inherit that until `StopSignal` listens:
    none is lost while they import."""

    def __init__(self, command: Sequence[str], num_ranks: int, node: Node | None) -> None:
        super().__init__(name="torchrun", daemon=True)
        self.command = list(command)
        meeting: dict[str, Any] = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0"}
        if node is not None:
            meeting = {
                "rdzv_backend": "static",
                "rdzv_endpoint": f"{node.address}:{node.port}",
                "rdzv_configs": {"rank": node.number, "timeout": MEET_S},
            }
        num_nodes = 1 if node is None else node.num_nodes
        self.config = LaunchConfig(
            min_nodes=num_nodes,
            max_nodes=num_nodes,
            nproc_per_node=num_ranks,
            run_id=f"local-{os.getpid()}" if node is None else "nodes",
            max_restarts=0,
            **meeting,
        )
        self.error: Exception | None = None

    def run(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, _FORWARDED)
        for name in ("agent.server.api", "multiprocessing.api"):  # what they say in pages, `_tell` says in a line
            logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.CRITICAL)
        try:
            elastic_launch(self.config, self.command[0])(*self.command[1:])
        except Exception as error:
            self.error = error


@contextlib.contextmanager
def _signals_forwarded() -> Iterator[list[int]]:
    """Send stop signals on to all child processes while the block runs. Yields the list of those that came."""
    came: list[int] = []
    first = FirstSignal()

    def forward(number: int, _frame: FrameType | None) -> None:
        came.append(number)
        ends_now = first.is_followed()
        for child in psutil.Process().children():
            with contextlib.suppress(psutil.NoSuchProcess):
                child.send_signal(signal.SIGKILL if ends_now else _FORWARDED[signal.Signals(number)])

    before: dict[signal.Signals, Any] = {number: signal.getsignal(number) for number in _FORWARDED}
    if before[signal.SIGHUP] is signal.SIG_IGN:  # started with nohup
        del before[signal.SIGHUP]
    for number in before:
        signal.signal(number, forward)
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _causes(error: ChildFailedError) -> list[tuple[int, ProcessFailure]]:
    """The ranks that failed, the likeliest cause first.

    A rank that a signal killed takes others with it within one look of the agent, and the agent ends the rest by
    SIGTERM: those are left out unless nothing else is known.
    """
    failures = sorted(error.failures.items(), key=lambda item: (item[1].exitcode > 0, item[0]))
    causes = [(rank, failure) for rank, failure in failures if failure.exitcode != -signal.SIGTERM]
    return causes or failures


def _in_words(rank: int, failure: ProcessFailure) -> str:
    if failure.exitcode >= 0:
        return f"rank {rank} (pid {failure.pid}) ended with exit code {failure.exitcode}"
    hint = " (out of memory?)" if failure.exitcode == -signal.SIGKILL else ""
    return f"rank {rank} (pid {failure.pid}) was ended by {failure.signal_name()}{hint}"
