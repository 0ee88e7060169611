"""Converting a checkpoint against copying its files, and the memory that it takes."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from engram_checkpoints.checkpoint_files import sync_files
from engram_checkpoints.convert import convert, plan_conversion
from engram_megatron.benchmarks.measure import Comparison, interleaved
from engram_megatron.benchmarks.noise_checkpoint import write_noise
from engram_megatron.benchmarks.table_files import forget

TARGET = 0.5
GIB = 1024**3
PROGRAM = Path(__file__).parents[2] / "launch/convert.py"
# Starts the program that its arguments name and prints its exit status and largest resident memory in KiB. In a process
# of its own: what a program's parent had resident when it was started counts too.
_WATCH = """
import os, subprocess, sys
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
print(status, usage.ru_maxrss)
"""


def compare(folder: Path, num_rows: int, repeats: int) -> Iterator[Comparison]:
    """A checkpoint of `num_rows` table rows and as many bytes of other tensors, to Megatron's format and in ours with
    other blocks."""
    source = write_noise(folder / "source", num_rows * 960 // (3 * 4096), num_rows)
    size = _bytes(source)
    copy = folder / "copy"
    for to, overrides in (("torch_dist", ()), ("engram", ("tables.block_rows=16384",))):
        target = folder / to

        def run(to: str = to, overrides: tuple[str, ...] = overrides, target: Path = target) -> None:
            plan = plan_conversion(source, target, to, overrides, 2 * GIB)  # type: ignore[arg-type]
            convert(plan, lambda _bytes: None, lambda _bytes: None)

        def prepare(target: Path = target) -> None:
            shutil.rmtree(target, ignore_errors=True)
            target.with_name(f"{target.name}.journal").unlink(missing_ok=True)
            forget(source)

        seconds = interleaved(
            {"ours": run, "copy": lambda: _copy(source, copy)}, repeats, {"ours": prepare, "copy": prepare}
        )
        shutil.rmtree(target)
        name = f"convert {size / GIB:.2f} GiB to {to}"
        yield Comparison(name, seconds["ours"], "copied and synced", seconds["copy"], TARGET)


def memory_lines(folder: Path, num_rows: int) -> Iterator[str]:
    """Peak resident memory of launch/convert.py for a checkpoint eight times what `--memory-gib` gives it, beyond that
    of converting next to nothing."""
    small, large = (
        write_noise(folder / "small", 16, 4096),
        write_noise(folder / "large", num_rows * 960 // 12288, num_rows),
    )
    budget = _bytes(large) / 8 / GIB
    for to in ("torch_dist", "engram"):
        # How much of its libraries a program has resident depends on what of them the system has at hand.
        first, most, last = (_peak(source, folder / "out", to, budget) for source in (small, large, small))
        least = max(first, last)
        more = (most - least) / GIB
        verdict = "ok" if more <= budget else "short"
        yield (
            f"peak memory converting {_bytes(large) / GIB:.2f} GiB to {to} with --memory-gib {budget:.2f}: "
            f"{more:.2f} GiB beyond the interpreter's {least / GIB:.2f} ({verdict})"
        )


def _peak(source: Path, target: Path, to: str, memory_gib: float) -> int:
    """Bytes."""
    command = [sys.executable, str(PROGRAM), str(source), str(target), "--to", to, "--memory-gib", str(memory_gib)]
    done = subprocess.run([sys.executable, "-c", _WATCH, *command], capture_output=True, text=True, check=True)
    status, kib = map(int, done.stdout.split())
    assert status == 0, command
    shutil.rmtree(target)
    return kib * 1024


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _copy(source: Path, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    sync_files(target, [str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()])
