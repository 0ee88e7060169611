"""Jobs of a run from its submission to its end: what cannot be queued, what always fails, scancel, srun as launcher."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm_cluster import Cluster
from slurm_runs import Run
from tiny_run import train_losses

from engram_megatron.training.heartbeat import read_heartbeats

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

OPTIONS = ("training.num_steps=80", "checkpoint.every_steps=20")
JOB = ("--ranks-per-node=1", "--time=1:00:00", "--memory=100", "--hang-s=30")


@pytest.fixture
def run(slurm_cluster: Cluster, tmp_path: Path) -> Iterator[Run]:
    run = Run(slurm_cluster, tmp_path / "run")
    yield run
    slurm_cluster.attempt("scancel", "--me")


def test_run_that_always_fails_gives_up_with_the_reason(slurm_cluster: Cluster, run: Run, tiny_corpus: Path) -> None:
    wrong = ("optimizer.learning_rate=1e30", "optimizer.warmup_steps=1", "training.num_steps=20")
    run.submit(tiny_corpus, *wrong, *JOB, "--retries=2", "--chain=2")
    reason = run.wait_for_event("gave_up").fields["reason"]
    assert reason.startswith("2 tries in a row came no further than step 0")
    assert all("is nan" in event.fields["reason"] for event in run.events("ended")), run.told()
    status = json.loads(slurm_cluster.command(sys.executable, "slurm/status.py", str(run.path), "--json"))
    assert "gave up" in json.dumps(status)


def test_what_cannot_be_queued_is_told_in_a_line(run: Run, tiny_corpus: Path) -> None:
    for words, told in (
        (("--partition=none",), "invalid partition specified: none"),
        (("--time=1h",), "--time '1h' is no time of Slurm's"),
        (("parallel.tensor=3",), "world size 2 is not divisible by tensor"),
        (("data.corpus=/nowhere",), "/nowhere"),
        (("modle.num_layers=2",), "did you mean"),
        (("--apptainer-image=/nowhere.sif",), "/nowhere.sif does not exist"),
    ):
        line = run.try_to_submit(tiny_corpus, "--ranks-per-node=1", *words, code=2)
        assert line.startswith("error: "), line
        assert told in line
        assert line.count("\n") == 1
        assert not (run.path / "job/001").exists()


def test_run_that_is_queued_is_not_submitted_again(run: Run, tiny_corpus: Path) -> None:
    run.submit(tiny_corpus, *OPTIONS, *JOB, "--sbatch=--hold")
    assert "is queued or runs already as job" in run.try_to_submit(tiny_corpus, *OPTIONS, *JOB, code=2)


def test_srun_starts_ranks_without_torchrun(run: Run, tiny_corpus: Path) -> None:
    ranks = ("training.micro_batch_size=1", "tables.ranks_per_node=2", "--ranks-per-node=2", "--launcher=srun")
    run.submit(tiny_corpus, *OPTIONS, *JOB, *ranks)
    run.wait_for_step(25)
    run.rank(3).kill()
    run.wait_until_finished()
    assert "task 3 on node2 was ended by a signal: Killed" in run.events("ended")[0].fields["reason"]
    assert [start.fields["step"] for start in run.events("started")] == [0, 20]
    assert [beat.host for beat in read_heartbeats(run.path)] == ["node1", "node1", "node2", "node2"]
    assert sorted(train_losses(run.path)) == list(range(1, 81))


def test_scancel_ends_a_run_until_it_is_submitted_again(slurm_cluster: Cluster, run: Run, tiny_corpus: Path) -> None:
    job = run.submit(tiny_corpus, *OPTIONS, *JOB)
    run.wait_for_step(10)
    slurm_cluster.command("scancel", job)
    assert run.wait_for_event("stopped").fields["reason"] == "scancel"
    slurm_cluster.wait_for_state(job, ["CANCELLED"])
    assert run.status()["state"]["name"] == "stopped"
    run.submit(tiny_corpus, *OPTIONS, *JOB, "--resume")
    run.wait_for_event("finished")
    assert run.events("started")[1].fields["step"] >= 10, "saved at the scancel"
    assert sorted(train_losses(run.path)) == list(range(1, 81))


def test_scancel_is_told_where_slurm_kills_ranks_that_start(
    slurm_cluster: Cluster, run: Run, tiny_corpus: Path
) -> None:
    job = run.submit(tiny_corpus, *OPTIONS, *JOB)
    run.wait_for_event("started")
    slurm_cluster.command("scancel", job)
    assert run.wait_for_event("stopped").fields == {"reason": "scancel", "step": 0}
    slurm_cluster.wait_for_state(job, ["CANCELLED"])
