"""Jobs that get a node with a real fault name it, leave it out, and go on: elsewhere, or with fewer."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from other_zarr import FOLDERS, OTHER_VERSION, ZARR_VERSION, install_other_zarr, installed_zarr
from slurm_cluster import ROOT, Cluster, cluster_of
from slurm_runs import Run
from tiny_run import train_losses

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

STEPS = 40
ANY_RANKS = ("parallel.expert=1", "training.global_batch_size=12")  # one, two or three
BATCH = "training.global_batch_size=8"  # of experts on two ranks each: two or four ranks, and not three
JOB = ("--ranks-per-node=1", "--time=1:00:00", "--memory=100", "--hang-s=60")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Five nodes; the first one's /dev/shm has 1 MiB."""
    with cluster_of(5, "node1=1") as cluster:
        yield cluster


@pytest.fixture
def run(cluster: Cluster, tmp_path: Path) -> Iterator[Run]:
    run = Run(cluster, tmp_path / "run")
    cluster.wait_until_idle()
    yield run
    cluster.attempt("scancel", "--me")


@pytest.fixture
def other_version(cluster: Cluster, tmp_path: Path) -> Iterator[None]:
    """Of zarr on node4, which has it on its own disk."""
    install_other_zarr(tmp_path)
    for name in FOLDERS:
        cluster.command(*cluster.inside("node4", "mount", "--bind", f"{tmp_path / name}", f"{installed_zarr() / name}"))
    imported = cluster.command(*cluster.inside("node4", sys.executable, "-c", "import zarr; print(zarr.__version__)"))
    yield
    for name in FOLDERS:
        cluster.command(*cluster.inside("node4", "umount", f"{installed_zarr() / name}"))
    assert imported.strip() == OTHER_VERSION


@pytest.fixture
def bad_cable(cluster: Cluster) -> Iterator[None]:
    """At node3: one in 500 packets that it sends arrives with two words exchanged, and the right checksum."""
    if not Path("/dev/net/tun").exists():
        pytest.skip("this kernel has no TAP devices (/dev/net/tun)")
    command = cluster.inside("node3", sys.executable, str(ROOT / "tests/bad_cable.py"), "eth0", "500")
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as cable:
        assert cable.stdout is not None
        assert cable.stdout.readline() == "in place\n"
        yield
        cable.kill()
    cluster.crash("node3")
    cluster.boot("node3")


def _check_replaced(run: Run, node: str, reason: str, first: list[str], then: list[str]) -> None:
    """A preflight of the nodes `first` found `node` bad, and the run finished on `then`."""
    run.wait_until_finished()
    assert run.events("allocated")[0].fields["nodes"] == first
    assert list(run.events("preflight")[0].fields["bad_nodes"]) == [node], run.told()
    told = run.events("preflight")[0].fields["bad_nodes"][node]
    assert reason in told
    assert [event.fields["nodes"] for event in run.events("started")] == [then]
    assert run.status()["bad_nodes"] == {node: told}
    assert f"bad nodes {node}: {told}" in run.shown()


def test_node_with_too_little_shared_memory(run: Run, tiny_corpus: Path) -> None:
    """A job of the chain that waits already does without it, too."""
    first = run.submit(tiny_corpus, *JOB, "--chain=2")
    reason = "4.0 MiB of /dev/shm are needed by 1 ranks, 1.0 MiB of 1.0 MiB are free"
    _check_replaced(run, "node1", reason, ["node1", "node2"], ["node2", "node3"])
    replacement = run.events("requeued")[0].fields["next_job"]
    waiting = next(job for job in run.events("submitted")[0].fields["jobs"] if job != first)
    assert run.events("started")[0].job == f"{waiting}.0", "its turn came before that of the new one"
    run.cluster.wait_until_ended(replacement)
    assert len(run.events("started")) == 1, "nothing was left to do"


@pytest.mark.usefixtures("other_version")
def test_node_with_another_version_of_a_package(run: Run, tiny_corpus: Path) -> None:
    run.submit(tiny_corpus, *JOB, *ANY_RANKS, "--nodes=3", "--exclude=node1")
    reason = f"zarr is {OTHER_VERSION} here and {ZARR_VERSION} on 2 of 3 nodes"
    _check_replaced(run, "node4", reason, ["node2", "node3", "node4"], ["node2", "node3", "node5"])


@pytest.mark.usefixtures("bad_cable")
def test_node_whose_network_damages_what_it_sends(run: Run, tiny_corpus: Path) -> None:
    """Three nodes are left then, and with experts on two ranks two of them are of use."""
    told = run.try_to_submit(tiny_corpus, *JOB, BATCH, "--nodes=4", "--min-nodes=2", "--exclude=node1")
    assert "on 3 nodes 2 train: parallel: data * tensor * context = 3 * 1 * 1 = 3 is not " in told
    reason = "3 of its 3 links failed (to node2, node4, node5); from node3 to node2 gloo delivered "
    _check_replaced(run, "node3", reason, ["node2", "node3", "node4", "node5"], ["node2", "node4"])
    given = run.events("allocated")[1].fields
    assert given == {"nodes": ["node2", "node4"], "asked_for": 4, "idle": ["node5"]}
    assert "from step 0 on 2 of 4 nodes: node2 node4" in run.shown()


def test_run_gives_up_where_too_few_nodes_are_good(run: Run, tiny_corpus: Path) -> None:
    run.submit(tiny_corpus, *JOB, "--exclude=node[3-5]")
    reason = run.wait_for_event("gave_up").fields["reason"]
    assert reason.startswith("bad nodes node1, and Slurm has no 2 others beside --exclude node[3-5]; repair one, or ")


def test_run_that_loses_a_node_goes_on_with_fewer(run: Run, cluster: Cluster, tiny_corpus: Path) -> None:
    steps = (f"training.num_steps={STEPS}", "checkpoint.every_steps=10")
    job = (*JOB, *ANY_RANKS, *steps, "--nodes=3", "--exclude=node1,node5")
    undisturbed = Run(cluster, run.path.with_name("undisturbed"))
    undisturbed.submit(tiny_corpus, *job)
    undisturbed.wait_until_finished()
    cluster.wait_until_idle()
    run.submit(tiny_corpus, *job, "--min-nodes=2")
    run.wait_for_step(15)
    cluster.crash("node4")
    run.wait_until_finished()
    cluster.boot("node4")
    first, second = run.events("started")
    assert (first.fields["nodes"], second.fields["nodes"]) == (["node2", "node3", "node4"], ["node2", "node3"])
    step = second.fields["step"]
    assert step >= 10, "from the newest checkpoint"
    assert f"from step {step} on 2 of 3 nodes: node2 node3" in run.shown()
    losses, expected = train_losses(run.path), train_losses(undisturbed.path)
    assert sorted(losses) == list(range(1, STEPS + 1))
    assert [losses[i] for i in range(1, step + 1)] == [expected[i] for i in range(1, step + 1)]
    # Sums over ranks and microbatches are taken in another order from there on, in float32: 4e-5 from step 10 to 40.
    assert losses == pytest.approx(expected, rel=1e-4)
