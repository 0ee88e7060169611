"""`slurm/preflight.py` as Slurm starts it on each node: processes of this host, and two hosts in network namespaces.

The corrupted link is that of tests/faulty_preflight.py, the small /dev/shm a mount of a node's own, the other version
a folder on its PYTHONPATH.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from namespaces import ADDRESSES, run_in_namespaces
from other_zarr import OTHER_VERSION, install_other_zarr
from ranks import free_port, run_ranks
from tiny_run import TINY, tiny_config

ROOT = Path(__file__).parents[2]
SMALL_SHM = ("unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o size=1m tmpfs /dev/shm && exec "$@"', "sh")


def _command(
    rank: int,
    num_nodes: int,
    address: str,
    port: int,
    folders: tuple[Path, Path],
    *more: str,
    script: str = "slurm/preflight.py",
) -> list[str]:
    corpus, run_dir = folders
    where = ("--rank", str(rank), "--world-size", str(num_nodes), "--master-addr", address, "--master-port", str(port))
    who = ("--node-name", f"n{rank}", "--round", "10")
    return [
        *(sys.executable, str(ROOT / script), "engram_tiny", *where, *who, *TINY, "parallel.expert=1"),
        *("training.global_batch_size=12", f"data.corpus={corpus}", f"run_dir={run_dir}", *more),
    ]


class Ended(NamedTuple):
    code: int
    output: str
    errors: str


def _run(commands: Sequence[Sequence[str]], variables: Mapping[int, Mapping[str, str]] | None = None) -> list[Ended]:
    """Run all `commands` beside each other until they end; `variables`: more for the environment of some."""
    local = {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            command,
            env=os.environ | local | dict((variables or {}).get(number, {})) | {"PYTHONPATH": _path(variables, number)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number, command in enumerate(commands)
    ]
    try:
        told = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [Ended(process.returncode, *text) for process, text in zip(processes, told, strict=True)]


def _path(variables: Mapping[int, Mapping[str, str]] | None, number: int) -> str:
    first = (variables or {}).get(number, {}).get("PYTHONPATH", "")
    return os.pathsep.join(path for path in (first, *sys.path) if path)


def _report(run_dir: Path) -> Any:
    return json.loads((run_dir / "job/preflight.json").read_text())


def _take_part(rank: int, num_ranks: int, port: int, corpus: Path, run_dir: Path, num_nodes: int) -> Any:
    from engram_megatron import platform
    from engram_megatron.jobs.node_meeting import Meeting
    from engram_megatron.jobs.node_needs import node_needs
    from engram_megatron.jobs.node_preflight import Limits, run_preflight

    platform.limit_threads(1)
    platform.install()
    config = tiny_config(corpus, run_dir, "parallel.expert=1", "training.global_batch_size=12")
    needs = node_needs(config, num_nodes, 1)
    meeting = Meeting.join("127.0.0.1", port, rank, num_nodes, 30, serves=rank == 0)
    limits, expected = Limits(nodes_s=3, round_s=10), {num_ranks: "n-lost"}
    return run_preflight(config, needs, meeting, f"n{rank}", limits=limits, expected=expected)


def test_node_that_does_not_come_is_named_and_the_others_know(tiny_corpus: Path, tmp_path: Path) -> None:
    (code, report), *others = run_ranks(_take_part, 2, free_port(), tiny_corpus, tmp_path, 3)
    assert [code, *(other for other, _ in others)] == [3, 3]
    assert report.errors == []
    assert report.bad_nodes == {
        "n-lost": "it did not come within 3 s; is it down, cut off, or does Python not start there?"
    }
    assert report.slowest_link.startswith("slowest link n")
    assert _report(tmp_path)["bad_nodes"] == report.bad_nodes


@pytest.mark.slow
def test_sound_nodes_pass_and_leave_a_report(tiny_corpus: Path, tmp_path: Path) -> None:
    port, folders = free_port(), (tiny_corpus, tmp_path)
    ended = _run([_command(rank, 2, "127.0.0.1", port, folders) for rank in (0, 1)])
    assert [node.code for node in ended] == [0, 0], ended
    assert ended[0].output.startswith("preflight: 2 nodes, 0 bad; slowest link "), ended
    assert ended[1].output == ""
    report = _report(tmp_path)
    assert (report["bad_nodes"], report["errors"]) == ({}, [])
    assert report["seconds"] > 0
    assert list((tmp_path / "job/preflight").iterdir()) == []


@pytest.mark.slow
def test_bad_nodes_are_named_with_their_reasons(tiny_corpus: Path, tmp_path: Path) -> None:
    """Of six: one has another zarr, one a small /dev/shm, one a network card that changes bytes, one does not come."""
    port, folders = free_port(), (tiny_corpus, tmp_path / "run")
    install_other_zarr(tmp_path / "other")
    options = ("--wait", "40", "--node-names", "n0,n1,n2,n3,n4,n5")
    commands = [_command(rank, 6, "127.0.0.1", port, folders, *options) for rank in range(5)]
    commands[2] = [*SMALL_SHM, *commands[2]]
    commands[3] = _command(3, 6, "127.0.0.1", port, folders, *options, script="tests/faulty_preflight.py")
    ended = _run(commands, {1: {"PYTHONPATH": str(tmp_path / "other")}})
    assert [node.code for node in ended] == [3] * 5, ended
    report = _report(tmp_path / "run")
    bad = report["bad_nodes"]
    assert report["errors"] == []
    assert sorted(bad) == ["n1", "n2", "n3", "n5"], bad
    assert bad["n1"].startswith(f"zarr is {OTHER_VERSION} here and ")
    assert bad["n2"].startswith("4.0 MiB of /dev/shm are needed by 1 ranks, 1.0 MiB of 1.0 MiB are free")
    assert bad["n3"].startswith("3 of its 3 links failed (to n")
    assert "gloo delivered 1 wrong bytes, the first at 54321" in bad["n3"]
    assert bad["n5"].startswith("it did not come within 40 s")
    assert all(f"bad node {name}: {reason}\n" in ended[0].output for name, reason in bad.items())


@pytest.mark.slow
def test_corrupted_link_between_two_hosts_is_found(tiny_corpus: Path, tmp_path: Path) -> None:
    port, folders = free_port(), (tiny_corpus, tmp_path)
    good, bad = (
        _command(rank, 2, ADDRESSES[0], port, folders, script=script)
        for rank, script in enumerate(("slurm/preflight.py", "tests/faulty_preflight.py"))
    )
    ends_with_3 = ("sh", "-c", '"$@"; test $? = 3', "sh")
    told = run_in_namespaces([[*ends_with_3, *good], [*ends_with_3, *bad]], [{}, {}])
    assert "bad node n1: the link between n0 and n1 failed" in told[0], told
    assert "from n1 to n0 gloo delivered 1 wrong bytes, the first at 54321" in _report(tmp_path)["bad_nodes"]["n1"]


@pytest.mark.slow
def test_mistakes_end_in_one_line_on_the_first_node(tiny_corpus: Path, tmp_path: Path) -> None:
    def fails(commands: Sequence[Sequence[str]], *codes: int) -> str:
        ended = _run(commands)
        assert tuple(node.code for node in ended) == codes, ended
        assert all(node.errors == "" for node in ended[1:]), ended
        return ended[0].errors + ended[0].output

    port, folders = free_port(), (tiny_corpus, tmp_path)
    wrong = [_command(rank, 2, "127.0.0.1", port, folders, "tables.block_rowz=1") for rank in (0, 1)]
    assert fails(wrong, 2, 2).startswith("error: unknown key 'tables.block_rowz'")
    same = [_command(rank, 2, "127.0.0.1", port, folders, "--node-name", "n0") for rank in (0, 1)]
    assert fails(same, 2, 2).startswith("error: the preflight runs more than once on node n0; start one task per node")
    shutil.copytree(tiny_corpus, tmp_path / "broken")
    shutil.rmtree(tmp_path / "broken/train")
    broken = [_command(rank, 2, "127.0.0.1", port, (tmp_path / "broken", tmp_path)) for rank in (0, 1)]
    assert "2 of 2 nodes, n0 first: " in fails(broken, 2, 2)
