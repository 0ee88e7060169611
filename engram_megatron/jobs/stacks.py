"""Where the ranks of a run stand, seen from outside: stacks of all their threads, taken by py-spy.

The ranks need not answer, or even run: a stopped process has a stack, too.
"""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import psutil

_TIMEOUT_S = 20.0


def ranks_here(run_dir: Path) -> dict[int, psutil.Process]:
    """The processes on this host that are ranks of the run in `run_dir`, by rank."""
    found = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if f"run_dir={run_dir}" in process.cmdline():
                rank = process.environ().get("RANK")
                if rank is not None:
                    found[int(rank)] = process
    return dict(sorted(found.items()))


def dump_stacks(run_dir: Path, folder: Path) -> list[str]:
    """Write one file for each rank of the run on this host into `folder`, which is made. Returns a line for each."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for rank, process in ranks_here(run_dir).items():
        state = _state(process)
        (folder / f"rank_{rank:05d}.txt").write_text(
            f"rank {rank} on {socket.gethostname()}, pid {process.pid}, {state}\n\n{_stack(process.pid)}"
        )
        lines.append(f"rank {rank} on {socket.gethostname()}: {state}")
    return lines


def _state(process: psutil.Process) -> str:
    """As the kernel calls it: running, sleeping, stopped (by a signal), disk-sleep (a file system does not answer)."""
    try:
        return str(process.status())
    except psutil.Error:
        return "gone"


def _stack(pid: int) -> str:
    program = shutil.which("py-spy", path=str(Path(sys.executable).parent)) or shutil.which("py-spy")
    if program is None:
        return "py-spy is not installed\n"
    try:
        done = subprocess.run(
            [program, "dump", "--nonblocking", "--pid", str(pid)],
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"py-spy did not answer within {_TIMEOUT_S:g} s\n"
    return done.stdout if done.returncode == 0 else f"py-spy: {done.stderr}"
