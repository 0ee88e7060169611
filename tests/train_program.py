"""`python launch/train.py` as a user starts it, in processes of its own."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import psutil
from tiny_run import TINY

ROOT = Path(__file__).parents[1]
TRAIN = ROOT / "launch/train.py"
TIMEOUT_S = 240.0


def train_module() -> ModuleType:
    """launch/train.py as a module, for calls in this process."""
    spec = importlib.util.spec_from_file_location("launch_train", TRAIN)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Ended(NamedTuple):
    code: int
    output: str
    errors: str
    seconds: float  # between what was done to the program and its end
    left: list[str]  # processes of the run that are still there


class Program:
    """A started `launch/train.py`. Leaving the block kills what is left of it.

    `script`: started in its place. `variables`: more for its environment.
    """

    def __init__(
        self,
        run_dir: Path,
        corpus: Path,
        *options: str,
        launcher: Sequence[str] = (sys.executable,),
        script: str = "launch/train.py",
        variables: Mapping[str, str] | None = None,
    ) -> None:
        self.run_dir = run_dir
        command = [*launcher, script, "engram_tiny", *TINY]
        self.process = subprocess.Popen(
            [*command, f"data.corpus={corpus}", f"run_dir={run_dir}", *options],
            cwd=ROOT,
            env={**os.environ, **(variables or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *_exception: object) -> None:
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.communicate()

    def processes(self) -> list[psutil.Process]:
        """All processes that name this run folder: launcher and ranks."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                if f"run_dir={self.run_dir}" in process.cmdline():
                    found.append(process)
        return found

    def rank(self, rank: int) -> psutil.Process:
        return next(p for p in self.processes() if p.environ().get("RANK") == str(rank))

    def wait_for_step(self, step: int) -> str:
        """Read the output until `step` was logged."""
        return self.wait_for_line(rf"step +{step}/\d+ \| loss")

    def wait_for_save(self, step: int) -> str:
        """Read the output until the checkpoint of `step` was complete."""
        return self.wait_for_line(rf"saved .*/step_0*{step}$")

    def wait_for_line(self, pattern: str) -> str:
        """Read the output until a line matches."""
        assert self.process.stdout is not None
        lines = []
        for line in self.process.stdout:
            lines.append(line)
            if re.match(pattern, line):
                return "".join(lines)
        raise AssertionError(f"ended before a line {pattern!r}: {''.join(lines)}{self.end()}")

    def end(self) -> Ended:
        started = time.monotonic()
        output, errors = self.process.communicate(timeout=TIMEOUT_S)
        left = [" ".join(process.cmdline()) for process in self.processes()]
        return Ended(self.process.returncode, output, errors, time.monotonic() - started, left)
