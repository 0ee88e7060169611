"""`python launch/train.py` as a user starts it, on two ranks: a run, a killed rank, a stop, and their resumes.

The expensive parts are shared: an unbroken run, and the same run killed, stopped and finished in three starts.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
from tiny_run import TINY, train_losses

ROOT = Path(__file__).parents[2]
NUM_STEPS = 40
OVERRIDES = (*TINY, f"training.num_steps={NUM_STEPS}", "checkpoint.every_steps=3")


class Ended(NamedTuple):
    code: int
    output: str
    errors: str
    seconds: float  # between what was done to the program and its end
    left: list[str]  # processes of the run that are still there


class Program:
    """A started `launch/train.py`. Leaving the block kills what is left of it."""

    def __init__(self, run_dir: Path, corpus: Path, *options: str, launcher: Sequence[str] = (sys.executable,)) -> None:
        self.run_dir = run_dir
        command = [*launcher, "launch/train.py", "engram_tiny", *OVERRIDES]
        self.process = subprocess.Popen(
            [*command, f"data.corpus={corpus}", f"run_dir={run_dir}", *options],
            cwd=ROOT,
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
        assert self.process.stdout is not None
        lines = []
        for line in self.process.stdout:
            lines.append(line)
            if line.startswith(f"step {step:>6}/{NUM_STEPS} | loss"):
                return "".join(lines)
        raise AssertionError(f"ended before step {step}: {''.join(lines)}{self.end()}")

    def end(self) -> Ended:
        started = time.monotonic()
        output, errors = self.process.communicate(timeout=240)
        left = [" ".join(process.cmdline()) for process in self.processes()]
        return Ended(self.process.returncode, output, errors, time.monotonic() - started, left)


@pytest.fixture(scope="module")
def straight(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ended]:
    """The run without an interruption."""
    run_dir = tmp_path_factory.mktemp("straight") / "run"
    with Program(run_dir, tiny_corpus, "--nproc-per-node=2") as program:
        return run_dir, program.end()


@pytest.fixture(scope="module")
def killed(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, Ended]:
    """The same run; rank 1 is killed after step 5. Returns (folder, its pid, the end)."""
    run_dir = tmp_path_factory.mktemp("broken") / "run"
    with Program(run_dir, tiny_corpus, "--nproc-per-node=2") as program:
        program.wait_for_step(5)
        victim = program.rank(1)
        victim.kill()
        return run_dir, victim.pid, program.end()


@pytest.fixture(scope="module")
def stopped(tiny_corpus: Path, killed: tuple[Path, int, Ended]) -> Ended:
    """The killed run, resumed, and stopped by SIGTERM some steps later."""
    with Program(killed[0], tiny_corpus, "--nproc-per-node=2", "--resume") as program:
        program.wait_for_step(8)
        program.process.send_signal(signal.SIGTERM)
        return program.end()


def test_run_ends_well_and_says_nothing_on_stderr(straight: tuple[Path, Ended]) -> None:
    run_dir, ended = straight
    assert (ended.code, ended.errors, ended.left) == (0, "", [])
    assert list(train_losses(run_dir)) == list(range(1, NUM_STEPS + 1))
    assert f"checkpoint   {run_dir}/checkpoints/step_{NUM_STEPS:08d}" in ended.output


def test_killed_rank_ends_the_job_and_is_named(killed: tuple[Path, int, Ended]) -> None:
    run_dir, pid, ended = killed
    assert ended.code == 128 + signal.SIGKILL
    assert ended.seconds < 60
    assert ended.left == []
    assert f"error: rank 1 (pid {pid}) was ended by SIGKILL" in ended.errors.splitlines()[-1]
    assert (run_dir / "checkpoints/step_00000003/COMPLETE").exists()


def test_sigterm_saves_and_ends_with_0(killed: tuple[Path, int, Ended], stopped: Ended) -> None:
    assert (stopped.code, stopped.errors, stopped.left) == (0, "", [])
    last = max(train_losses(killed[0]))
    assert 8 <= last < NUM_STEPS
    assert f"stopped by SIGTERM after step {last}; continue with --resume" in stopped.output
    assert (killed[0] / f"checkpoints/step_{last:08d}/COMPLETE").exists()


def test_killed_stopped_and_finished_run_is_the_straight_one(
    tiny_corpus: Path, straight: tuple[Path, Ended], killed: tuple[Path, int, Ended], stopped: Ended
) -> None:
    assert stopped.code == 0
    with Program(killed[0], tiny_corpus, "--nproc-per-node=2", "--resume") as program:
        ended = program.end()
    assert (ended.code, ended.errors) == (0, "")
    assert train_losses(killed[0]) == train_losses(straight[0])


@pytest.mark.slow
def test_stop_file_saves_ends_with_0_and_is_removed(tiny_corpus: Path, tmp_path: Path) -> None:
    with Program(tmp_path / "run", tiny_corpus, "--nproc-per-node=2") as program:
        program.wait_for_step(2)
        (tmp_path / "run/STOP").touch()
        ended = program.end()
    assert (ended.code, ended.errors) == (0, "")
    assert "stopped by file STOP" in ended.output
    assert not (tmp_path / "run/STOP").exists()


@pytest.mark.slow
def test_non_finite_loss_is_one_line_with_the_step(tiny_corpus: Path, tmp_path: Path) -> None:
    with Program(tmp_path / "run", tiny_corpus, "--nproc-per-node=2", "model.init_std=1e400") as program:
        ended = program.end()
    assert ended.code == 1
    first, second = ended.errors.splitlines()
    assert first.startswith("error: ")
    assert "in step 1; the optimizer has not moved" in first
    assert second.startswith("error: rank 0 (pid ")


@pytest.mark.slow
def test_one_process_without_a_launcher(tiny_corpus: Path, tmp_path: Path) -> None:
    with Program(tmp_path / "run", tiny_corpus, "parallel.expert=1") as program:
        program.wait_for_step(2)
        assert len(program.processes()) == 1
        program.process.send_signal(signal.SIGINT)
        ended = program.end()
    assert (ended.code, ended.errors) == (0, "")
    assert "stopped by SIGINT" in ended.output


@pytest.mark.slow
def test_under_torchrun_a_mistake_is_one_line_of_rank_0(tiny_corpus: Path, tmp_path: Path) -> None:
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    with Program(tmp_path / "run", tiny_corpus, "training.num_steps=2", launcher=torchrun) as program:
        assert program.end().code == 0
    with Program(tmp_path / "run", tiny_corpus, "training.num_steps=2", launcher=torchrun) as program:
        ended = program.end()
    assert ended.code != 0
    told = [line for line in ended.errors.splitlines() if line.startswith("error: ")]
    assert told == [f"error: {tmp_path}/run already holds a run; continue it with --resume or choose another run_dir"]
