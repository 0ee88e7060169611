"""`python launch/convert.py` as a user starts it: within its memory, on a full disk, killed."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from train_program import ROOT

from engram_checkpoints.compare import differences
from engram_checkpoints.open_checkpoint import open_checkpoint
from engram_megatron.benchmarks.noise_checkpoint import write_noise

KILLS = int(os.environ.get("KILLS", "5"))
MIB = 1024**2


def start(*arguments: object, max_file_bytes: int | None = None) -> subprocess.Popen[str]:
    def limit() -> None:
        if max_file_bytes is not None:  # as on a full disk
            resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, max_file_bytes))

    command = [sys.executable, str(ROOT / "launch/convert.py"), *map(str, arguments)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, preexec_fn=limit)


def peak_memory(*arguments: object) -> int:
    """Bytes that the program had resident at most."""
    process = start(*arguments)
    _, status, usage = os.wait4(process.pid, 0)
    assert process.stderr is not None
    assert status == 0, process.stderr.read()
    return usage.ru_maxrss * 1024


@pytest.mark.slow
@pytest.mark.parametrize("to", ["engram", "torch_dist", "from torch_dist"])
def test_checkpoint_eight_times_the_memory_is_converted_within_it(tmp_path: Path, to: str) -> None:
    """Against the same program with next to nothing to convert, which is the interpreter's own."""
    budget = 160 * MIB
    rows = 8 * budget // 2  # bytes of tensors, and as many of table rows
    sources = {"small": (16, 4096), "large": (rows // 3 // 4096, rows // 960)}
    target = to
    for name, sizes in sources.items():
        source = write_noise(tmp_path / name, *sizes)
        if to == "from torch_dist":
            peak_memory(source, tmp_path / f"{name}_torch_dist", "--to", "torch_dist")
            target = "engram"

    def peak(name: str) -> int:
        source = tmp_path / (f"{name}_torch_dist" if to == "from torch_dist" else name)
        out = tmp_path / "out"
        found = peak_memory(source, out, "--to", target, "--memory-gib", budget / 1024**3)
        shutil.rmtree(out)
        return found

    # How much of its libraries a program has resident depends on what of them the system has at hand: twice, therefore.
    small, large = peak("small"), peak("large")
    assert large - max(small, peak("small")) < budget, (small, large)


def test_full_disk_is_told_in_one_line_and_room_lets_it_go_on(tmp_path: Path) -> None:
    source, target = write_noise(tmp_path / "source", 2048, 8192), tmp_path / "target"
    process = start(source, target, max_file_bytes=2 * MIB)
    _, errors = process.communicate()
    assert (process.returncode, errors.count("\n")) == (1, 1), errors
    assert errors.startswith("error: ")
    assert "File too large" in errors
    assert not target.exists()
    assert start(source, target).wait() == 0
    assert list(differences(open_checkpoint(target), open_checkpoint(source))) == []


@pytest.mark.slow
@pytest.mark.timeout(60 * KILLS + 300)
@pytest.mark.parametrize("to", ["engram", "torch_dist"])
def test_killed_at_random_instants_it_goes_on_and_ends_with_the_same(tmp_path: Path, to: str) -> None:
    source, target = write_noise(tmp_path / "source", 20_000, 262_144), tmp_path / "target"
    began = time.monotonic()
    assert start(source, tmp_path / "straight", "--to", to).wait() == 0
    whole, instant = time.monotonic() - began, random.Random(3)
    for _ in range(KILLS):
        process = start(source, target, "--to", to)
        time.sleep(instant.uniform(0.3, 1.0) * whole)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if target.exists():
            assert list(differences(open_checkpoint(target), open_checkpoint(source))) == []
            shutil.rmtree(target)
            (tmp_path / "target.journal").unlink(missing_ok=True)
    assert start(source, target, "--to", to).wait() == 0
    assert list(differences(open_checkpoint(target), open_checkpoint(source))) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "straight", "target"]
