"""A job of two nodes in which something happens to a message or to a rank: all of it ends, nothing wrong is kept.

One run of `launch/train.py` meets four faults one after the other, each in a step that would end with a save, and is
resumed after each of them; a second run meets none.
"""

from __future__ import annotations

import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from tiny_run import backbone, tables, train_losses
from train_program import Ended, Program

pytestmark = pytest.mark.slow  # six starts of a job

NUM_STEPS, SAVE_EVERY, STEPS_BEFORE = 12, 2, 3
RUN = (
    *("--nproc-per-node=2", f"training.num_steps={NUM_STEPS}"),
    *(f"checkpoint.every_steps={SAVE_EVERY}", "checkpoint.keep_last=0", "checkpoint.asynchronous=false"),
    "tables.ranks_per_node=1",  # so that rows cross the network although both ranks are on this host
    "parallel.collective_timeout_s=3600",  # so that no collective gives up by itself while a test waits
)
DAMAGE = ("row ids", "rows", "gradients")
FAULTS = (*(f"damage {what}" for what in DAMAGE), "kill")


class Broken(NamedTuple):
    ended: Ended
    seconds: float  # from the fault to the end of the job
    saves: list[str]  # that stand then, whole or not


class Runs(NamedTuple):
    straight: Path
    faulty: Path
    broken: dict[str, Broken]  # by fault
    last: Ended  # of the start without a fault


@pytest.fixture(scope="module")
def runs(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("faults")
    straight, faulty = folder / "straight", folder / "faulty"
    with Program(straight, tiny_corpus, *RUN) as program:
        ended = program.end()
        assert (ended.code, ended.errors) == (0, ""), ended
    broken = {fault: _start_with(fault, faulty, tiny_corpus, folder / fault) for fault in FAULTS}
    with Program(faulty, tiny_corpus, *RUN, "--resume") as program:
        return Runs(straight, faulty, broken, program.end())


def _start_with(fault: str, run_dir: Path, corpus: Path, mark: Path) -> Broken:
    variables = {"FAULT": fault, "FAULT_AFTER": str(STEPS_BEFORE), "FAULT_FILE": str(mark)}
    with Program(run_dir, corpus, *RUN, "--resume", script="tests/faulty_train.py", variables=variables) as program:
        try:
            ended = program.end()
        except subprocess.TimeoutExpired as error:
            raise AssertionError(f"{fault}: the job does not end; it happened: {mark.exists()}") from error
    assert mark.exists(), f"{fault}: it never happened; the job ended with {ended}"
    assert ended.code != 0, f"{fault}: nobody noticed, the job went on to its end"
    return Broken(ended, time.time() - mark.stat().st_mtime, _names(run_dir))


def _names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_ends_every_process_of_the_job_in_seconds(runs: Runs, fault: str) -> None:
    ended = runs.broken[fault].ended
    assert ended.code == (128 + signal.SIGKILL if fault == "kill" else 1), ended.errors
    assert ended.left == []
    assert runs.broken[fault].seconds < 30


@pytest.mark.parametrize("what", DAMAGE)
def test_one_line_names_what_was_damaged_and_both_ranks_with_their_hosts(runs: Runs, what: str) -> None:
    host = socket.gethostname()
    lines = runs.broken[f"damage {what}"].ended.errors.splitlines()
    told = [line for line in lines if line.startswith("error: ") and "damaged" in line]
    assert len(told) == 1, lines
    names = f"rank 1 ({host}) received {what} from rank 0 ({host}) that differ from what was sent"
    assert told[0].startswith(f"error: rank 1 on {host} failed: DamageError: {names}: exchange ")


def test_killed_rank_is_named(runs: Runs) -> None:
    last = runs.broken["kill"].ended.errors.splitlines()[-1]
    assert last.startswith("error: rank 1 (pid ")
    assert "was ended by SIGKILL" in last


def test_steps_before_a_fault_are_saved_and_its_own_is_not(runs: Runs) -> None:
    for number, fault in enumerate(FAULTS, 1):
        steps = range(SAVE_EVERY, SAVE_EVERY * number + 1, SAVE_EVERY)
        assert runs.broken[fault].saves == [f"step_{step:08d}" for step in steps], fault


def test_every_save_is_that_of_the_run_without_faults_to_the_bit(runs: Runs) -> None:
    assert len(_names(runs.straight)) == NUM_STEPS // SAVE_EVERY
    assert _names(runs.faulty) == _names(runs.straight)
    for name in _names(runs.faulty):
        _check_equal(runs.faulty / "checkpoints" / name, runs.straight / "checkpoints" / name)


def _check_equal(found: Path, expected: Path) -> None:
    assert (found / "COMPLETE").exists(), found.name
    ours, theirs = tables(found), tables(expected)
    assert ours.keys() == theirs.keys()
    assert theirs["last_step"].any()
    for name, values in theirs.items():
        np.testing.assert_array_equal(ours[name], values, err_msg=f"{name} of {found.name}")
    weights, straight_weights = backbone(found), backbone(expected)
    assert weights.keys() == straight_weights.keys()
    different = [name for name, tensor in straight_weights.items() if not torch.equal(weights[name], tensor)]
    assert different == [], found.name


def test_run_goes_on_after_every_fault_with_the_losses_of_the_run_without(runs: Runs) -> None:
    assert (runs.last.code, runs.last.errors, runs.last.left) == (0, "", [])
    assert list(train_losses(runs.faulty)) == list(range(1, NUM_STEPS + 1))
    assert train_losses(runs.faulty) == train_losses(runs.straight)
