"""A spike of the loss under Slurm: rolled back and tried again in the same allocation, or given up."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm_cluster import Cluster
from slurm_runs import Run
from spiky_corpus import BATCH, build_spiky_corpus
from tiny_run import train_losses

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

STEPS, SKIPPED_STEPS = 80, 12
OPTIONS = (
    *(f"training.num_steps={STEPS}", "checkpoint.every_steps=5", "checkpoint.keep_last=0", "spikes.max_rollbacks=1"),
    *("spikes.window_steps=24", "spikes.deviations=3", "spikes.steps_in_a_row=3", "spikes.margin_steps=7"),
    f"spikes.skip_steps={SKIPPED_STEPS}",
)
JOB = ("--ranks-per-node=1", "--time=1:00:00", "--memory=100", "--exclude=node4")


@pytest.fixture
def run(slurm_cluster: Cluster, tmp_path: Path) -> Iterator[Run]:
    run = Run(slurm_cluster, tmp_path / "run")
    yield run
    slurm_cluster.attempt("scancel", "--me")


def test_run_rolls_back_and_ends_in_the_same_allocation(
    slurm_cluster: Cluster, run: Run, tiny_corpus: Path, tmp_path: Path
) -> None:
    num_samples = (STEPS + SKIPPED_STEPS) * BATCH
    corpus = build_spiky_corpus(tiny_corpus, tmp_path / "corpus", num_samples, range(50, 54))  # 0-based
    run.submit(corpus, *OPTIONS, *JOB)
    run.wait_until_finished()
    assert [event.kind for event in run.events()] == [
        *("submitted", "allocated", "preflight", "started", "loss_spike", "ended", "started", "finished"),
    ], run.told()
    (spike,) = run.events("loss_spike")
    assert (spike.fields["step"], spike.fields["checkpoint_step"], spike.fields["window_step"]) == (53, 40, 43)
    assert (spike.fields["first_sample"], spike.fields["stop_sample"]) == (43 * BATCH, (43 + SKIPPED_STEPS) * BATCH)
    assert run.events("started")[1].fields["step"] == 40
    assert run.events("ended")[0].fields["reason"].startswith("the loss spiked; rolled back to step 40")
    assert sorted(path.name for path in run.path.glob("checkpoints/rolled_back_001/*")) == [
        *("step_00000045", "step_00000050"),
    ]
    losses = train_losses(run.path)
    assert list(losses) == list(range(1, STEPS + 1))
    status = slurm_cluster.command(sys.executable, "slurm/status.py", str(run.path))
    assert "rollbacks    back to step 40, 12 batches skipped after step 43 (samples 172 to 219 of the order)" in status


def test_spikes_that_rollbacks_do_not_cure_are_given_up(slurm_cluster: Cluster, run: Run, tiny_corpus: Path) -> None:
    run.submit(tiny_corpus, *OPTIONS, "optimizer.learning_rate=1e30", "optimizer.warmup_steps=1", *JOB)
    reason = run.wait_for_event("gave_up").fields["reason"]
    assert "is nan" in reason
    assert "has rolled back 1 times already" in reason
    assert [event.kind for event in run.events("started", "loss_spike", "ended", "gave_up")] == [
        *("started", "loss_spike", "ended", "started", "ended", "gave_up"),
    ], run.told()
    status = json.loads(slurm_cluster.command(sys.executable, "slurm/status.py", str(run.path), "--json"))
    assert status["state"]["name"] == "failed"
    assert len(status["rollbacks"]) == 1
