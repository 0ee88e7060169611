"""Runs on a real cluster, with every fault there is: they end with the losses and tables of one that nothing befell."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm_cluster import Cluster
from slurm_faults import FAULTS, Fault
from slurm_runs import Run, assert_equal_ends
from tiny_run import Start, run_starts, tiny_config, train_losses

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

EVERY = 20  # steps from a checkpoint to the next
STEPS_PER_FAULT = 30
RANDOM_FAULTS = int(os.environ.get("RANDOM_FAULTS", "0"))
NUM_FAULTS = RANDOM_FAULTS or len(FAULTS)
STEPS = STEPS_PER_FAULT * NUM_FAULTS + 2 * EVERY
JOB = ("--ranks-per-node=1", "--time=2:00:00", "--memory=100", "--hang-s=45", "--exclude=node4")


def options(num_steps: int) -> tuple[str, ...]:
    return f"training.num_steps={num_steps}", f"checkpoint.every_steps={EVERY}"


@pytest.fixture(scope="module")
def undisturbed(slurm_cluster: Cluster, tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = Run(slurm_cluster, tmp_path_factory.mktemp("slurm") / "undisturbed")
    run.submit(tiny_corpus, *options(STEPS), *JOB)
    run.wait_until_finished()
    return run


@pytest.fixture
def run(slurm_cluster: Cluster, tmp_path: Path) -> Iterator[Run]:
    run = Run(slurm_cluster, tmp_path / "run")
    yield run
    slurm_cluster.attempt("scancel", "--me")
    slurm_cluster.mend()


def test_two_nodes_train_as_two_ranks_of_one_host(undisturbed: Run, tiny_corpus: Path, tmp_path: Path) -> None:
    host = tiny_config(tiny_corpus, tmp_path / "host", *options(STEPS), "tables.ranks_per_node=1")
    run_starts([Start(host, stop_after=30)])
    expected = train_losses(tmp_path / "host")
    found = train_losses(undisturbed.path)
    assert sorted(found) == list(range(1, STEPS + 1))
    assert {step: found[step] for step in expected} == expected
    kinds = [event.kind for event in undisturbed.events()]
    assert kinds == ["submitted", "allocated", "preflight", "started", "finished"]


def choose_faults(choose: random.Random) -> list[Fault]:
    """Every fault once, in some order; with `RANDOM_FAULTS` so many, any of them at any time (`make soak`: 20)."""
    return choose.choices(FAULTS, k=RANDOM_FAULTS) if RANDOM_FAULTS else choose.sample(FAULTS, k=NUM_FAULTS)


@pytest.mark.timeout(300 + 120 * NUM_FAULTS)
def test_run_goes_through_faults_as_if_nothing_had_happened(
    slurm_cluster: Cluster, run: Run, undisturbed: Run, tiny_corpus: Path
) -> None:
    seed = int(os.environ.get("FAULT_SEED", random.randrange(1 << 30)))
    print(f"FAULT_SEED={seed}")  # in the environment it repeats this row
    choose = random.Random(seed)
    run.submit(tiny_corpus, *options(STEPS), *JOB)
    for number, fault in enumerate(choose_faults(choose)):
        run.wait_until_it_trains(number + 1)
        run.wait_for_step(STEPS_PER_FAULT * number + choose.randrange(5, STEPS_PER_FAULT))
        struck = run.step
        print(f"step {struck}: {fault.name}", flush=True)
        reasons = len(run.events("ended", "lost"))
        fault.strike(slurm_cluster, run)
        start = run.wait_for_event("started", number + 2)
        assert start.fields["step"] >= struck // EVERY * EVERY - EVERY, f"from the newest checkpoint: {run.told()}"
        told = [event.fields["reason"] for event in run.events("ended", "lost")[reasons:]]
        assert fault.told in "".join(told), run.told()
        slurm_cluster.mend()
    run.wait_until_finished()
    assert len(run.events("started")) == NUM_FAULTS + 1, run.told()
    for hang in run.events("hang"):
        stacks = Path(hang.fields["stacks"])
        assert "stopped" in (stacks / "rank_00001.txt").read_text().splitlines()[0]
        assert "training/run.py" in (stacks / "rank_00000.txt").read_text()
    assert_equal_ends(run, undisturbed)


def test_chain_job_takes_over_where_slurm_does_not_requeue(
    slurm_cluster: Cluster, run: Run, undisturbed: Run, tiny_corpus: Path
) -> None:
    run.submit(tiny_corpus, *options(STEPS), *JOB, "--chain=2", "--sbatch=--no-requeue")
    run.wait_for_step(25)
    slurm_cluster.crash(run.events("started")[-1].fields["nodes"][0])
    run.wait_until_finished()
    first, second = run.events("submitted")[-1].fields["jobs"]
    assert [event.job for event in run.events("started")] == [f"{first}.0", f"{second}.0"]
    assert slurm_cluster.job_state(first) == "NODE_FAIL"
    assert_equal_ends(run, undisturbed)
