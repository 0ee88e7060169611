"""Two hosts on one machine: Linux network namespaces that nothing but a pair of virtual Ethernet devices joins.

Processes in them share memory and files, but no address: what goes from one to the other crosses the pair, whose bytes
the kernel counts.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from rank_program import rank_command, rank_environment, results
from ranks import free_port

ADDRESSES = ("10.85.0.1", "10.85.0.2")
INTERFACE = "veth0"  # in both namespaces
TIMEOUT_S = 240.0


@contextlib.contextmanager
def joined_namespaces() -> Iterator[list[str]]:
    """Names of two namespaces; skips the test where none can be made. What still runs in them at the end is killed."""
    if shutil.which("ip") is None:
        pytest.skip("network namespaces need the program `ip` (iproute2)")
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    names = [f"engram-test-{os.getpid()}-{secrets.token_hex(4)}-{number}" for number in range(len(ADDRESSES))]
    try:
        for name in names:
            _make(name)
        _ip("link", "add", INTERFACE, "netns", names[0], "type", "veth", "peer", "name", INTERFACE, "netns", names[1])
        for name, address in zip(names, ADDRESSES, strict=True):
            _ip("-n", name, "address", "add", f"{address}/24", "dev", INTERFACE)
            for interface in ("lo", INTERFACE):
                _ip("-n", name, "link", "set", interface, "up")
        yield names
    finally:
        for name in names:
            _delete(name)


def bytes_sent() -> int:
    """What has left the namespace of this process so far, with the headers of packets."""
    return int(Path(f"/sys/class/net/{INTERFACE}/statistics/tx_bytes").read_text())


def run_namespace_ranks(module: str, function: str, *args: Any) -> list[Any]:
    """Results by rank of `module.function(rank, 2, *args)`, each rank in a namespace of its own.

    `module` is importable from `tests/`; arguments and results can be pickled. Raises AssertionError with all output
    when a rank fails, or when they have not ended in `TIMEOUT_S`.
    """
    variables = {"WORLD_SIZE": str(len(ADDRESSES)), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    variables |= {"MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": str(free_port())}
    with tempfile.TemporaryDirectory() as folder:
        command = rank_command(module, function, folder, args)
        run_in_namespaces([command] * len(ADDRESSES), [variables | {"RANK": str(rank)} for rank in (0, 1)])
        return results(folder, len(ADDRESSES))


def run_in_namespaces(commands: Sequence[Sequence[str]], variables: Sequence[Mapping[str, str]]) -> list[str]:
    """Run one command in each of two fresh namespaces until all have ended with 0; what each has written.

    `variables` go to their environments; gloo is told to use the pair.
    """
    with joined_namespaces() as names, contextlib.ExitStack() as stack:
        outputs = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in names]
        processes = [
            subprocess.Popen(
                ["ip", "netns", "exec", name, *command],
                env=rank_environment() | {"GLOO_SOCKET_IFNAME": INTERFACE} | dict(more),
                cwd=Path(__file__).parents[1],
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            for name, command, more, output in zip(names, commands, variables, outputs, strict=True)
        ]
        problem = _wait(processes)
        for process in processes:
            process.kill()
            process.wait()
        for output in outputs:
            output.seek(0)
        texts = [output.read() for output in outputs]
    assert problem is None, "\n".join([problem, *(f"--- namespace {i}\n{text}" for i, text in enumerate(texts))])
    return texts


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> str | None:
    """Until all have ended with 0: None. Until one has failed, or too late: what went wrong."""
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        codes = [process.poll() for process in processes]
        if codes == [0] * len(codes):
            return None
        failed = [number for number, code in enumerate(codes) if code not in (None, 0)]
        if failed:
            return f"the command in namespace {failed[0]} ended with exit code {codes[failed[0]]}"
        if time.monotonic() > deadline:
            return f"hang: exit codes after {TIMEOUT_S:g} s are {codes}"
        time.sleep(0.05)


def _make(name: str) -> None:
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if made.returncode != 0:
        pytest.skip(f"network namespaces cannot be made here: {made.stderr.strip()}")


def _delete(name: str) -> None:
    """A namespace lives as long as a process in it; none of them can be anybody else's."""
    inside = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False)
    for pid in inside.stdout.split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
    subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr.strip()}"
