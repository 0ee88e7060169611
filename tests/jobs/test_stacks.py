"""Stacks of ranks, seen from outside: of one that sleeps, and of one that a signal has stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from engram_megatron.jobs.stacks import dump_stacks, ranks_here

PROGRAM = "import time\ndef waits_for_a_peer():\n    print('up', flush=True)\n    time.sleep(600)\nwaits_for_a_peer()\n"


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[list[subprocess.Popen[str]]]:
    command = [sys.executable, "-c", PROGRAM, f"run_dir={tmp_path}"]
    started = [
        subprocess.Popen(command, env={**os.environ, "RANK": str(rank)}, stdout=subprocess.PIPE, text=True)
        for rank in (0, 7)
    ]
    for process in started:
        assert process.stdout is not None
        process.stdout.readline()
    yield started
    for process in started:
        process.kill()
        process.communicate()


def test_each_rank_of_the_run_gets_a_file_whatever_it_does(ranks: list[subprocess.Popen[str]], tmp_path: Path) -> None:
    os.kill(ranks[1].pid, signal.SIGSTOP)
    while ranks_here(tmp_path)[7].status() != "stopped":
        time.sleep(0.01)
    lines = dump_stacks(tmp_path, tmp_path / "stacks")
    assert [line.split(" on ")[0] for line in lines] == ["rank 0", "rank 7"]
    assert lines[1].endswith(": stopped")
    for rank in (0, 7):
        assert "waits_for_a_peer" in (tmp_path / f"stacks/rank_{rank:05d}.txt").read_text()
    assert ranks_here(tmp_path / "other") == {}
