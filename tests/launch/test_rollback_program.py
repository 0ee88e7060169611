"""`launch/train.py` killed at random instants, started again with other ranks, over a spike of the loss: each sample is
trained once, by what the model was fed, but for those that are skipped, and the run ends as one that nothing befell."""

from __future__ import annotations

import contextlib
import os
import random
import signal
from pathlib import Path

import numpy as np
import pytest
from recorded_run import read_records
from spiky_corpus import BATCH, build_spiky_corpus, samples_by_content
from tiny_run import train_losses
from train_program import Ended, Program

from engram_checkpoints.run_checkpoints import complete_checkpoints
from engram_megatron.training.rollback_log import read_rollbacks

pytestmark = pytest.mark.slow  # a start for every kill

KILLS = int(os.environ.get("KILLS", "6"))
SPIKY_STEPS = tuple(range(120, 126))  # 0-based
STEPS, SKIPPED_STEPS = 200, 16
RUN = (
    *(f"training.num_steps={STEPS}", "checkpoint.every_steps=5", "checkpoint.keep_last=4", "--resume"),
    *("spikes.max_rollbacks=2", "spikes.window_steps=32", "spikes.steps_in_a_row=3", "spikes.margin_steps=10"),
    *("spikes.skip_steps=16",),
)
LAYOUTS = (
    ("--nproc-per-node=2",),
    ("--nproc-per-node=1", "parallel.expert=1"),
    ("--nproc-per-node=2", "parallel.expert=1", "parallel.tensor=2"),
    ("--nproc-per-node=2", "parallel.expert=1", "parallel.pipeline=2"),
)


def _start(run_dir: Path, corpus: Path, layout: tuple[str, ...], records: Path, kill_after_lines: int | None) -> Ended:
    """A start that is killed after so many lines, None: not at all."""
    records.mkdir(parents=True)
    variables = {"RECORDS": str(records)}
    with Program(run_dir, corpus, *RUN, *layout, script="tests/recorded_run.py", variables=variables) as program:
        if kill_after_lines is not None:
            assert program.process.stdout is not None
            lines = iter(program.process.stdout)
            for _ in range(kill_after_lines):
                next(lines, None)
            for process in program.processes():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
        return program.end()


@pytest.mark.timeout(60 * KILLS + 600)
def test_each_sample_is_trained_once(tiny_corpus: Path, tmp_path: Path) -> None:
    num_samples = (STEPS + SKIPPED_STEPS) * BATCH
    corpus = build_spiky_corpus(tiny_corpus, tmp_path / "corpus", num_samples, SPIKY_STEPS)
    run_dir, chance = tmp_path / "run", random.Random(3)
    folders: list[Path] = []
    codes: list[int] = []
    while 0 not in codes:
        assert len(folders) < 4 * KILLS, "the run comes no further"
        folders.append(tmp_path / f"records/{len(folders):03d}")
        may_kill = len(codes) - codes.count(3) < KILLS
        layout = chance.choice(LAYOUTS)
        ended = _start(run_dir, corpus, layout, folders[-1], chance.randrange(3, 90) if may_kill else None)
        assert ended.left == []
        codes.append(ended.code)
        assert ended.code in (0, 3) or may_kill, ended
        if ended.code == 3:
            assert ended.errors.count("error: ") == 1, ended.errors
            assert "error: the loss spiked; rolled back to step 1" in ended.errors
    trained = read_records(folders, samples_by_content(corpus))
    assert sorted(trained.surviving) == list(range(STEPS))
    survived = [sample for step in range(STEPS) for sample in trained.surviving[step]]
    assert len(survived) == len(set(survived)) == STEPS * BATCH, "a sample was trained twice"
    (rollback,) = read_rollbacks(run_dir)
    assert rollback.batches == SKIPPED_STEPS
    skipped = set(range(num_samples)) - set(survived)
    assert len(skipped) == rollback.stop_sample - rollback.first_sample == SKIPPED_STEPS * BATCH
    assert codes.count(3) == 1
    losses = train_losses(run_dir)
    assert list(losses) == list(range(1, STEPS + 1))
    assert max(np.diff(list(losses.values()))) < 2, "a spike, of five nats, is left in the curve"
    assert int(complete_checkpoints(run_dir)[-1].name.removeprefix("step_")) == STEPS
