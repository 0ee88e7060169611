"""Run one function on several gloo ranks, forked from one server so that imports are paid once.

A rank that raises ends the call with its traceback; a hang is killed after `timeout_s` and ends it with the stacks of
all ranks. The ranks are forked from a server that has run no multi-threaded kernel, so forking is safe.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import queue
import random
import signal
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any


class RanksError(AssertionError):
    """A run on several ranks that did not end as it should. `reason`: one line; the text has the stacks too."""

    def __init__(self, reason: str, details: str) -> None:
        super().__init__(f"{reason}\n{details}")
        self.reason = reason


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 120.0) -> list[Any]:
    """Call `function(rank, world_size, *args)` on `world_size` ranks with a gloo default group; results by rank.

    `function` must stand at the top level of a module; results must be picklable, and hold arrays instead of tensors:
    torch hands those over in memory that ends with the rank.

    Raises:
        RanksError: a rank raised, died, or did not end in `timeout_s` seconds; all ranks were ended.
    """
    context = _forkserver()
    with tempfile.TemporaryDirectory() as scratch:
        results = context.Queue()
        port = free_port()
        processes = [
            context.Process(
                target=_rank_main, args=(function, rank, world_size, port, scratch, results, args), daemon=True
            )
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        answers = _collect(processes, results, world_size, timeout_s, Path(scratch))
    return [answers[rank] for rank in range(world_size)]


def _forkserver() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["engram_megatron.layouts.preload"])
    return context


def _collect(processes: list[Any], results: Any, world_size: int, timeout_s: float, scratch: Path) -> dict[int, Any]:
    answers: dict[int, Any] = {}
    deadline = time.monotonic() + timeout_s
    failure, details = None, ""
    while len(answers) < world_size and failure is None:
        try:
            rank, error, value = results.get(timeout=0.2)
        except queue.Empty:
            if time.monotonic() > deadline:
                failure = f"hang: ranks {sorted(set(range(world_size)) - set(answers))} did not end in {timeout_s} s"
            dead = [r for r, p in enumerate(processes) if p.exitcode not in (None, 0) and r not in answers]
            if dead and results.empty():
                failure = f"rank {dead[0]} died with exit code {processes[dead[0]].exitcode}"
            continue
        if error:
            failure, details = f"rank {rank} failed: {error.strip().splitlines()[-1]}", error
        answers[rank] = value
    if failure is not None:
        raise RanksError(failure, details + _end_with_stacks(processes, scratch))
    for process in processes:
        process.join(20)
        if process.is_alive():
            process.kill()
    return answers


def _end_with_stacks(processes: list[Any], scratch: Path) -> str:
    """Kill all ranks; what those that were alive were doing."""
    for process in processes:
        if process.is_alive():
            os.kill(process.pid, signal.SIGUSR1)  # faulthandler writes its stacks
    time.sleep(0.5)
    stacks = "".join(f"\n--- {p.name}\n{p.read_text()}" for p in sorted(scratch.iterdir()) if p.stat().st_size)
    for process in processes:
        process.kill()
    return stacks


def _rank_main(
    function: Callable[..., Any], rank: int, world_size: int, port: int, scratch: str, results: Any, args: tuple[Any]
) -> None:
    with open(f"{scratch}/rank{rank}.stacks", "w") as stacks:
        faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
        import torch
        import torch.distributed as dist

        torch.set_num_threads(1)
        os.environ.update(
            RANK=str(rank),
            WORLD_SIZE=str(world_size),
            LOCAL_RANK=str(rank),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
            GLOO_SOCKET_IFNAME="lo",
        )
        try:
            dist.init_process_group("gloo", rank=rank, world_size=world_size, timeout=timedelta(seconds=60))
            value = function(rank, world_size, *args)
            results.put((rank, None, value))
            dist.barrier()
            dist.destroy_process_group()
        except BaseException:
            results.put((rank, traceback.format_exc(), None))
            results.close()
            results.join_thread()
            os._exit(1)


def free_port() -> int:
    """A port that nobody listens on, below the range from which the kernel serves outgoing connections: one from there
    could be taken by any of gloo's own connections before rank 0 listens on it."""
    while True:
        port = random.SystemRandom().randrange(12000, 30000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
