"""A run killed at random instants, most of them within a save, loses nothing but the save that was under way.

`KILLS` says how often (5; `make soak`: 50).
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_run import backbone
from train_program import Program

from engram_checkpoints.checkpoint_files import damages, is_complete, read_manifest
from engram_checkpoints.table_reader import TableReader

pytestmark = pytest.mark.slow  # a start for every kill

KILLS = int(os.environ.get("KILLS", "5"))
KEPT = 2
RUN = (
    *("--nproc-per-node=2", "--resume", "training.num_steps=4000", "training.validate_every_steps=0"),
    *("training.validation_batches=1", "checkpoint.every_steps=1", f"checkpoint.keep_last={KEPT}"),
)


def _folders(run_dir: Path) -> list[Path]:
    return sorted((run_dir / "checkpoints").iterdir())


def _complete(run_dir: Path) -> list[Path]:
    return [path for path in _folders(run_dir) if is_complete(path)]


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


def _start_and_kill(run_dir: Path, corpus: Path, instant: random.Random, *options: str) -> None:
    """Kill every process of the job at a random instant of a random one of its first saves."""
    with Program(run_dir, corpus, *RUN, *options) as program:
        assert program.process.stdout is not None
        done = 0
        for line in program.process.stdout:
            done += line.startswith("saved ")
            if done == 2:
                break
        assert done == 2, program.end()
        time.sleep(instant.uniform(0.0, 1.5))
        for process in program.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        said = re.findall(r"^saved .*/step_(\d+)$", program.end().output, re.MULTILINE)
    complete = _complete(run_dir)
    # Of those that were said to be saved the newest is there still, and all that is there is whole.
    assert _step(complete[-1]) >= max(map(int, said), default=0), (said, complete)
    assert len(complete) >= KEPT
    for checkpoint in complete:
        assert list(damages(checkpoint, read_manifest(checkpoint).items())) == [], checkpoint
    # What is not whole: the save under way, and an old one on its way out.
    assert len(_folders(run_dir)) - len(complete) <= 2, (complete, _folders(run_dir))


@pytest.mark.timeout(60 * KILLS + 600)
@pytest.mark.parametrize(
    "options",
    [("checkpoint.asynchronous=false",), ("checkpoint.staging_bytes=20000", "checkpoint.deltas_between_full=2")],
    ids=["waited_for", "beside_training_with_deltas"],
)
def test_killed_run_goes_on_from_its_newest_save_as_if_nothing_had_happened(
    tiny_corpus: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    killed, straight = tmp_path / "killed", tmp_path / "straight"
    instant = random.Random(5)
    for _ in range(KILLS):
        _start_and_kill(killed, tiny_corpus, instant, *options)
    with Program(killed, tiny_corpus, *RUN, *options) as program:
        program.wait_for_step(_step(_complete(killed)[-1]) + 3)
        (killed / "STOP").touch()
        ended = program.end()
        assert (ended.code, ended.left) == (0, []), ended
    last = _complete(killed)[-1]
    assert _folders(killed) == _complete(killed), "leftovers must be removed"
    every = f"checkpoint.every_steps={_step(last)}"
    with Program(straight, tiny_corpus, *RUN, *options, every) as program:
        program.wait_for_save(_step(last))
    (expected,) = _complete(straight)
    ours, theirs = (TableReader(path / "tables.zarr") for path in (last, expected))  # of which one may be a delta
    assert ours.description.step_count == theirs.description.step_count
    rows, same = (reader.rows(0, reader.description.total_rows) for reader in (ours, theirs))
    for name in ("weight", "state", "last_step"):
        np.testing.assert_array_equal(getattr(rows, name), getattr(same, name), err_msg=name)
    weights, found = backbone(expected), backbone(last)
    assert [name for name, tensor in weights.items() if not torch.equal(found[name], tensor)] == []
