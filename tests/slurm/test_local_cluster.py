"""The local cluster is one: nodes of their own, crashes, preemption; and nothing of it is left."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from slurm_cluster import Cluster

from engram_megatron.errors import UsageError
from engram_megatron.local_cluster import cluster, network
from engram_megatron.local_cluster.choose import shm_sizes
from engram_megatron.local_cluster.machine import command_inside
from engram_megatron.local_cluster.programs import missing_packages
from engram_megatron.local_cluster.settings import load_settings

NODES = ["node1", "node2", "node3"]


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A short path that is nobody's yet: sockets lie below it."""
    if missing_packages():
        pytest.skip(f"a cluster needs {' '.join(missing_packages())}")
    with tempfile.TemporaryDirectory(prefix="lc-") as parent:
        yield Path(parent) / "c"


@pytest.fixture(scope="module")
def local_cluster(folder: Path) -> Iterator[Cluster]:
    """Three nodes; /dev/shm of the second has 8 MiB."""
    if (because := network.why_no_namespaces()) is not None:
        pytest.skip(f"nodes cannot be namespaces here: {because}")
    settings = cluster.up(folder, len(NODES), 2, ["node2=8"])
    try:
        yield Cluster(settings)
    finally:
        if folder.exists():
            cluster.down(folder)


def _processes_of(folder: Path) -> list[psutil.Process]:
    """Those that run: one that is dead, and waits for its parent, has no command line any more."""
    return [found for found in psutil.process_iter(["cmdline"]) if str(folder) in " ".join(found.info["cmdline"] or [])]


def test_nodes_are_machines_of_their_own(local_cluster: Cluster) -> None:
    names = local_cluster.command("srun", "-N3", "hostname").split()
    assert sorted(names) == NODES
    sizes = local_cluster.command("srun", "-N3", "--label", "df", "--output=size", "-m", "/dev/shm")
    assert [line.split()[-1] for line in sizes.splitlines() if line.startswith("1:")] == ["1M-blocks", "8"]
    local_cluster.command("srun", "-N1", "-wnode1", "touch", "/dev/shm/mine", f"{local_cluster.settings.scratch}/mine")
    for path in ("/dev/shm/mine", f"{local_cluster.settings.scratch}/mine"):
        assert local_cluster.command("srun", "-N3", "--label", "sh", "-c", f"ls {path} || true").split() == ["0:", path]


def test_nodes_reach_each_other_by_name_and_nobody_else(local_cluster: Cluster) -> None:
    listen = ["python3", "-c", "import socket; print(socket.create_server(('', 7000)).accept()[1][0])"]
    inside = command_inside(local_cluster.settings, "node1", listen)
    with subprocess.Popen(inside, stdout=subprocess.PIPE, text=True) as server:
        knock = "for i in $(seq 50); do (exec 3<>/dev/tcp/node1/7000) 2>/dev/null && exit; sleep 0.1; done; exit 1"
        local_cluster.command("srun", "-N1", "-wnode3", "bash", "-c", knock)
        assert server.communicate()[0].strip() == local_cluster.settings.node("node3").address
    routes = local_cluster.command("srun", "-N1", "ip", "route")
    assert "default" not in routes


@pytest.mark.slow
def test_job_of_a_crashed_node_goes_on_elsewhere(local_cluster: Cluster) -> None:
    job = local_cluster.submit("srun sleep 600", "--requeue", "--nodes=1", "--nodelist=node1", "--output=/dev/null")
    local_cluster.wait_for_state(job, ["RUNNING"])
    local_cluster.crash("node1")
    with pytest.raises(UsageError, match="node1 is off already"):
        local_cluster.crash("node1")
    local_cluster.wait_for_state(job, ["PENDING"])
    assert local_cluster.job_fields(job)["Restarts"] == "1"
    local_cluster.command("scontrol", "update", f"jobid={job}", "reqnodelist=node3")
    local_cluster.wait_for_state(job, ["RUNNING"])
    assert local_cluster.job_fields(job)["NodeList"] == "node3"
    local_cluster.boot("node1")
    assert local_cluster.command("srun", "-N1", "-wnode1", "hostname").strip() == "node1"
    local_cluster.command("scancel", job)


@pytest.mark.slow
def test_urgent_job_preempts(local_cluster: Cluster) -> None:
    low = local_cluster.submit("sleep 600", "--requeue", "--nodes=3", "--exclusive", "--output=/dev/null")
    local_cluster.wait_for_state(low, ["RUNNING"])
    high = local_cluster.submit("true", "--partition=urgent", "--nodes=3", "--exclusive", "--output=/dev/null")
    local_cluster.wait_for_state(high, ["COMPLETED"])
    assert local_cluster.job_fields(low)["Restarts"] == "1"
    assert local_cluster.job_state(low) in ("PENDING", "RUNNING", "REQUEUED", "COMPLETING")
    local_cluster.command("scancel", low)


def test_down_leaves_nothing(local_cluster: Cluster, folder: Path) -> None:
    with pytest.raises(UsageError, match="is up in"):
        cluster.up(folder)
    assert _processes_of(folder)
    cluster.down(folder)
    assert not _processes_of(folder)
    assert not folder.exists()
    assert str(folder) not in Path("/proc/mounts").read_text()
    assert not Path(f"/sys/class/net/{network.host_interface(folder)}").exists()
    with pytest.raises(UsageError, match="no cluster in"):
        load_settings(folder)


def test_plain_processes(folder: Path) -> None:
    plain = Cluster(cluster.up(folder, 2, plain=True))
    try:
        job = plain.submit("(setsid sleep 86399 &) ; sleep 86399", "--nodelist=node1", "--output=/dev/null")
        plain.wait_for_state(job, ["RUNNING"])
        plain.command("srun", "-N2", "sh", "-c", "until pgrep -f 'sleep 86399'; do sleep 0.1; done")
        plain.crash("node1")
        assert [state.is_on for state in cluster.states(plain.settings)] == [False, True]
        assert not [found for found in psutil.process_iter(["cmdline"]) if found.info["cmdline"] == ["sleep", "86399"]]
    finally:
        cluster.down(folder)
    assert not _processes_of(folder)


def test_up_cleans_what_a_killed_one_has_left(folder: Path) -> None:
    program = [sys.executable, "slurm/local_cluster.py", "up", "--plain", "--nodes=3", f"--dir={folder}"]
    with subprocess.Popen(program, cwd=Path(__file__).parents[2], stdout=subprocess.DEVNULL) as killed:
        while not (folder / "processes" / "node1").exists():
            assert killed.poll() is None
            time.sleep(0.01)
        killed.kill()
    left = set(_processes_of(folder))
    assert left
    try:
        cluster.up(folder, 1, plain=True)
        assert not left & set(_processes_of(folder))
    finally:
        cluster.down(folder)


def test_up_says_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="--shm-mib node9=1: there is no node9"):
        shm_sizes(NODES, ["node9=1"])
    assert shm_sizes(NODES, ["node2=8", "64"]) == {"node1": 64, "node2": 8, "node3": 64}
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    with pytest.raises(UsageError, match="apt-get install iproute2 munge slurm-wlm util-linux"):
        cluster.up(tmp_path / "c")
