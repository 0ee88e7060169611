"""Runs on a real cluster, each with another fault: they end with the losses and tables of one that nothing befell."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from slurm_runs import Cluster, Run
from tiny_run import Start, backbone, run_starts, tables, tiny_config, train_losses

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

STEPS = 120
OPTIONS = (f"training.num_steps={STEPS}", "checkpoint.every_steps=20")
JOB = ("--ranks-per-node=1", "--time=1:00:00", "--memory=100", "--hang-s=30", "--exclude=node4")
Fault = Callable[[Cluster, Run, str], None]


@pytest.fixture(scope="module")
def undisturbed(slurm_cluster: Cluster, tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = Run(slurm_cluster, tmp_path_factory.mktemp("slurm") / "undisturbed")
    run.submit(tiny_corpus, *OPTIONS, *JOB)
    run.wait_until_finished()
    return run


@pytest.fixture
def run(slurm_cluster: Cluster, tmp_path: Path) -> Iterator[Run]:
    run = Run(slurm_cluster, tmp_path / "run")
    yield run
    slurm_cluster.attempt("scancel", "--me")


def _kill_rank(_cluster: Cluster, run: Run, _job: str) -> None:
    run.rank(1).kill()


def _stop_rank(_cluster: Cluster, run: Run, _job: str) -> None:
    os.kill(run.rank(1).pid, signal.SIGSTOP)


def _signal(cluster: Cluster, _run: Run, job: str) -> None:
    cluster.command("scancel", "--signal=USR1", job)


def _signal_of_time_limit(cluster: Cluster, _run: Run, job: str) -> None:
    cluster.command("scancel", "--batch", "--signal=USR1", job)


def _preempt(cluster: Cluster, _run: Run, _job: str) -> None:
    cluster.command("srun", "-purgent", "-N4", "--exclusive", "sleep", "1")


def _kill_slurmd(cluster: Cluster, run: Run, _job: str) -> None:
    node = run.events("started")[-1].fields["nodes"][1]
    cluster.kill_slurmd(node)
    run.wait_for_event("started", 2)
    cluster.crash(node)
    cluster.boot(node)


def _crash_node(cluster: Cluster, run: Run, _job: str, number: int = 1) -> None:
    node = run.events("started")[-1].fields["nodes"][number]
    cluster.crash(node)
    run.wait_for_event("started", 2)
    cluster.boot(node)


def _crash_head_node(cluster: Cluster, run: Run, job: str) -> None:
    _crash_node(cluster, run, job, 0)


def test_two_nodes_train_as_two_ranks_of_one_host(undisturbed: Run, tiny_corpus: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny_corpus, tmp_path / "host", *OPTIONS, "tables.ranks_per_node=1")
    threads = min(2, len(os.sched_getaffinity(0)))  # a rank has a node's two cores there: the same sums, rounded alike
    run_starts([Start(config, stop_after=30, threads=threads)])
    expected = train_losses(tmp_path / "host")
    found = train_losses(undisturbed.path)
    assert sorted(found) == list(range(1, STEPS + 1))
    assert {step: found[step] for step in expected} == expected
    assert [event.kind for event in undisturbed.events()] == [
        *("submitted", "allocated", "preflight", "started", "finished"),
    ]


FAULTS: list[tuple[Fault, str]] = [(_kill_rank, "was ended by SIGKILL")]
if os.environ.get("ALL_FAULTS"):  # make soak: each takes a minute, and more on a busy machine
    FAULTS += [
        (_stop_rank, "no progress for "),
        (_signal, "stopped by SIGUSR1"),
        (_signal_of_time_limit, "stopped by file STOP"),
        (_preempt, "stopped by SIG"),
        (_kill_slurmd, ""),
        (_crash_node, ""),
        (_crash_head_node, ""),
    ]


@pytest.mark.parametrize(("fault", "reason"), FAULTS)
def test_run_ends_as_if_nothing_had_happened(
    slurm_cluster: Cluster, run: Run, undisturbed: Run, tiny_corpus: Path, fault: Fault, reason: str
) -> None:
    job = run.submit(tiny_corpus, *OPTIONS, *JOB)
    run.wait_for_step(25)
    fault(slurm_cluster, run, job)
    run.wait_until_finished()
    starts = run.events("started")
    assert len(starts) == 2, run.told()
    assert starts[1].fields["step"] >= 20, "from the newest checkpoint"
    assert reason in "".join(event.fields["reason"] for event in run.events("ended"))
    assert train_losses(run.path) == train_losses(undisturbed.path)
    ours, theirs = (one.path / f"checkpoints/step_{STEPS:08d}" for one in (run, undisturbed))
    for name, values in tables(theirs).items():
        np.testing.assert_array_equal(tables(ours)[name], values, err_msg=name)
    weights, found = backbone(theirs), backbone(ours)
    assert [name for name, tensor in weights.items() if not torch.equal(found[name], tensor)] == []


def test_hang_leaves_stacks_that_name_the_stopped_rank(run: Run, tiny_corpus: Path) -> None:
    run.submit(tiny_corpus, *OPTIONS, *JOB)
    run.wait_for_step(10)
    os.kill(run.rank(1).pid, signal.SIGSTOP)
    stacks = Path(run.wait_for_event("hang").fields["stacks"])
    assert "stopped" in (stacks / "rank_00001.txt").read_text().splitlines()[0]
    assert "training/run.py" in (stacks / "rank_00000.txt").read_text()


def test_run_that_always_fails_gives_up_with_the_reason(slurm_cluster: Cluster, run: Run, tiny_corpus: Path) -> None:
    wrong = ("optimizer.learning_rate=1e30", "optimizer.warmup_steps=1", "training.num_steps=20")
    run.submit(tiny_corpus, *wrong, *JOB, "--retries=2", "--chain=2")
    reason = run.wait_for_event("gave_up").fields["reason"]
    assert reason.startswith("2 tries in a row came no further than step 0")
    assert all("is nan" in event.fields["reason"] for event in run.events("ended")), run.told()
    status = json.loads(slurm_cluster.command(sys.executable, "slurm/status.py", str(run.path), "--json"))
    assert "gave up" in json.dumps(status)


def test_what_cannot_be_queued_is_told_in_a_line(run: Run, undisturbed: Run, tiny_corpus: Path) -> None:
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
    assert "already holds a run" in undisturbed.try_to_submit(tiny_corpus, *OPTIONS, *JOB, code=2)
