"""A run whose only saves are on its nodes' disks, killed at random instants, each time with the loss of one of them.

Two ranks stand for two nodes. `KILLS` says how often (5; `make soak`: 50).
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_run import backbone, tables
from train_program import Program

pytestmark = pytest.mark.slow  # a start for every kill

KILLS = int(os.environ.get("KILLS", "5"))
RUN = (
    *("--nproc-per-node=2", "--resume", "training.num_steps=4000", "training.validation_batches=1"),
    *("checkpoint.every_steps=0", "tables.ranks_per_node=1", "checkpoint.staging_bytes=20000"),
)


def _start_and_kill(run_dir: Path, corpus: Path, instant: random.Random, *options: str) -> tuple[int, int]:
    """Kill every process at a random instant of one of the first saves. Returns the step that it went on from, and the
    last one whose save was said to be whole."""
    with Program(run_dir, corpus, *RUN, *options) as program:
        output = program.wait_for_line("saved .* on the disks of 2 nodes")
        output += program.wait_for_line("saved .* on the disks of 2 nodes")
        time.sleep(instant.uniform(0.0, 1.0))
        for process in program.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        output += program.end().output
    went_on = re.search(r"^made .*/step_(\d+) of what the nodes' disks hold", output, re.MULTILINE)
    saved = re.findall(r"^saved .*/step_(\d+)-\w+ on", output, re.MULTILINE)
    return 0 if went_on is None else int(went_on[1]), max(map(int, saved))


@pytest.mark.timeout(60 * KILLS + 600)
def test_run_that_loses_a_node_at_every_kill_goes_on_from_its_last_save(tiny_corpus: Path, tmp_path: Path) -> None:
    killed, straight, local = tmp_path / "killed", tmp_path / "straight", tmp_path / "local"
    options = (f"checkpoint.local_dir={local}", "checkpoint.local_every_steps=1")
    instant = random.Random(7)
    saved_before = 0
    for _ in range(KILLS):
        went_on, saved = _start_and_kill(killed, tiny_corpus, instant, *options)
        assert went_on >= saved_before, "a save that was said to be whole must be found"
        saved_before = saved
        node = instant.randrange(2)
        for part in [*local.glob(f"*/*/node_00{node}_of_002"), *local.glob(f"*/*/node_00{1 - node}_of_002.copy")]:
            shutil.rmtree(part)
    with Program(killed, tiny_corpus, *RUN, *options) as program:
        program.wait_for_line("saved .* on the disks of 2 nodes")
        (killed / "STOP").touch()
        ended = program.end()
        assert (ended.code, ended.left) == (0, []), ended
    assert len(list(local.glob("*/step_*"))) <= 2, "leftovers must be removed"
    last = max((killed / "checkpoints").iterdir())
    step = int(last.name.removeprefix("step_"))
    with Program(straight, tiny_corpus, *RUN, f"checkpoint.every_steps={step}") as program:
        program.wait_for_save(step)
    expected = straight / "checkpoints" / last.name
    for name, values in tables(expected).items():
        np.testing.assert_array_equal(tables(last)[name], values, err_msg=name)
    weights, found = backbone(expected), backbone(last)
    assert [name for name, tensor in weights.items() if not torch.equal(found[name], tensor)] == []
