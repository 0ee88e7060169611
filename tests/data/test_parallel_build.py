"""Builds by several workers, and builds that were stopped: always the bytes of one process that was left in peace."""

from __future__ import annotations

import contextlib
import gzip
import json
import lzma
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import psutil
import pytest
from mpi_ranks import mpiexec

from engram_data.build import BuildProgress, build_corpus
from engram_data.corpus_format import ArraySizes
from engram_data.documents import split_of
from engram_data.errors import CorpusError
from engram_data.text_source import Rejection, find_text_files, read_documents
from engram_data.tokenizer import CorpusTokenizer
from engram_data.workers import ProcessWorkers
from engram_data.writer import CorpusWriter

PROGRAM = Path(__file__).parents[2] / "launch/build_corpus.py"
SIZES = ArraySizes(256, 8192)
UNIT_BYTES = 30_000
FRACTION = 0.3
KILLS = int(os.environ.get("KILLS", "3"))  # `make soak`: 50


def json_lines(texts: list[str]) -> str:
    lines = [line for text in texts for line in (json.dumps({"text": text}), "", "junk")]
    return "\n".join(lines)


@pytest.fixture
def sources(tmp_path: Path, addresses: list[str]) -> Path:
    """All kinds of files, one of them cut into several units, with a rejected line behind each document."""
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text(addresses[0])
    (folder / "b.jsonl").write_text(json_lines(addresses[1:8]) + "\n")
    (folder / "c.jsonl.gz").write_bytes(gzip.compress(json_lines(addresses[8:10]).encode()))
    (folder / "d.jsonl.xz").write_bytes(lzma.compress(json_lines(addresses[10:11]).encode()))
    (folder / "e.jsonl").write_text(json_lines(addresses[11:]))
    (folder / "f.txt").write_text("")
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def build(sources: Path, out: Path, tokenizer: CorpusTokenizer, report=lambda progress: None, **options):
    options = {"token_sizes": SIZES, "unit_bytes": UNIT_BYTES, **options}
    return build_corpus([str(sources)], out, tokenizer, FRACTION, report, **options)


@pytest.fixture
def expected(tmp_path: Path, sources: Path, tokenizer: CorpusTokenizer) -> dict[str, bytes]:
    """The files of the corpus, written document by document, and what it tells of rejected lines added."""
    counts = {"documents": 0, "text_bytes": 0}
    out = tmp_path / "expected"
    rejections: list[Rejection] = []
    with CorpusWriter(out, tokenizer, SIZES) as writer:
        for document in read_documents(find_text_files([str(sources)]), rejections.append):
            (token_ids,) = tokenizer.encode_batch([document.text])
            writer.add(token_ids, split_of(document.text.encode(), FRACTION))
            counts["documents"] += 1
            counts["text_bytes"] += len(document.text.encode())
        writer.finish({str(sources): counts}, FRACTION)
    (out / "rejected.jsonl").write_text("".join(json.dumps(asdict(rejection)) + "\n" for rejection in rejections))
    summary = json.loads((out / "corpus.json").read_text()) | {"num_rejected": len(rejections)}
    (out / "corpus.json").write_text(json.dumps(summary, indent=2) + "\n")
    return files_of(out)


@pytest.mark.parametrize("unit_bytes", [1, 997, UNIT_BYTES, 2**24])
def test_units_of_any_size_give_the_same_bytes(
    tmp_path: Path, sources: Path, tokenizer: CorpusTokenizer, expected: dict[str, bytes], unit_bytes: int
) -> None:
    if unit_bytes == 1:  # a unit per byte of a line, and lines without a unit: of a small file
        for large in ("b.jsonl", "c.jsonl.gz", "d.jsonl.xz", "e.jsonl"):
            (sources / large).unlink()
        (sources / "b.jsonl").write_text('{"text": "one"}\n\njunk\n{"text": "two"}\n{"text": "three"}')
        small = files_of_build(tmp_path / "small", sources, tokenizer, 2**24)
        assert len(small["rejected.jsonl"].splitlines()) == 2
        assert files_of_build(tmp_path / "out", sources, tokenizer, 1) == small
    else:
        assert files_of_build(tmp_path / "out", sources, tokenizer, unit_bytes) == expected


def files_of_build(out: Path, sources: Path, tokenizer: CorpusTokenizer, unit_bytes: int) -> dict[str, bytes]:
    build(sources, out, tokenizer, unit_bytes=unit_bytes)
    return files_of(out)


def test_two_processes_give_the_same_bytes(
    tmp_path: Path, sources: Path, tokenizer: CorpusTokenizer, expected: dict[str, bytes]
) -> None:
    build(sources, tmp_path / "out", tokenizer, start_workers=lambda _: ProcessWorkers(2, threads=1))
    assert files_of(tmp_path / "out") == expected
    assert not (tmp_path / "out.partial").exists()


class Stop(BaseException):
    """As a signal."""


def test_build_stopped_after_any_step_goes_on(
    tmp_path: Path, sources: Path, tokenizer: CorpusTokenizer, expected: dict[str, bytes]
) -> None:
    out = tmp_path / "out"
    done = starts = 0
    while not out.exists():
        seen: list[BuildProgress] = []

        def report(progress: BuildProgress, seen: list[BuildProgress] = seen) -> None:
            seen.append(progress)
            if len(seen) == 3:  # what was there, and two steps
                raise Stop

        starts += 1
        with contextlib.suppress(Stop):
            build(sources, out, tokenizer, report)
        assert seen[0].num_documents == done, "documents were tokenised again, or lost"
        done = seen[-1].num_documents
    assert starts > 5
    assert files_of(out) == expected
    assert not (tmp_path / "out.partial").exists()


def stop_after_two_units(sources: Path, out: Path, tokenizer: CorpusTokenizer) -> None:
    seen = []

    def report(progress: BuildProgress) -> None:
        seen.append(progress)
        if len(seen) == 3:
            raise Stop

    with pytest.raises(Stop):
        build(sources, out, tokenizer, report)


def test_changed_sources_or_options_are_refused_by_name(
    tmp_path: Path, sources: Path, tokenizer: CorpusTokenizer
) -> None:
    out = tmp_path / "out"
    stop_after_two_units(sources, out, tokenizer)
    content = (sources / "e.jsonl").read_bytes()
    (sources / "e.jsonl").write_bytes(content + b"\n")
    with pytest.raises(CorpusError, match=r"other sources or options \(.*e.jsonl was changed .*\): remove it"):
        build(sources, out, tokenizer)
    (sources / "e.jsonl").unlink()
    with pytest.raises(CorpusError, match=r"e.jsonl is gone"):
        build(sources, out, tokenizer)
    (sources / "e.jsonl").write_bytes(content)  # at another time
    with pytest.raises(CorpusError, match=r"e.jsonl was changed"):
        build(sources, out, tokenizer)
    with pytest.raises(CorpusError, match=r"bytes of a unit: 30000 before, 1000 now"):
        build(sources, out, tokenizer, unit_bytes=1000)
    with pytest.raises(CorpusError, match="tokenizer: "):
        build(sources, out, CorpusTokenizer("small", tokenizer.json_bytes + b"\n"))


def test_source_that_changes_or_goes_during_the_build(
    tmp_path: Path, sources: Path, tokenizer: CorpusTokenizer
) -> None:
    def append(progress: BuildProgress) -> None:
        (sources / "e.jsonl").open("a").write("\n")

    with pytest.raises(CorpusError, match=r"e.jsonl was changed while it was read; .*out.partial is kept"):
        build(sources, tmp_path / "out", tokenizer, append)
    with pytest.raises(CorpusError, match=r"cannot read .*e.jsonl: No such file.*"):
        build(sources, tmp_path / "other", tokenizer, lambda progress: (sources / "e.jsonl").unlink(missing_ok=True))


def test_second_build_of_the_same_corpus_is_refused(
    tmp_path: Path, sources: Path, tokenizer: CorpusTokenizer, expected: dict[str, bytes]
) -> None:
    def build_again(progress: BuildProgress) -> None:
        with pytest.raises(CorpusError, match=r"out.partial exists: another build is writing it"):
            build(sources, tmp_path / "out", tokenizer)

    build(sources, tmp_path / "out", tokenizer, build_again)
    assert files_of(tmp_path / "out") == expected


def test_folder_of_something_else_is_refused_and_kept(
    tmp_path: Path, sources: Path, tokenizer: CorpusTokenizer
) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial/mine").write_text("x")
    with pytest.raises(CorpusError, match="is no build that could go on"):
        build(sources, tmp_path / "out", tokenizer)
    assert (tmp_path / "out.partial/mine").exists()


def program(sources: Path, out: Path, tokenizer: CorpusTokenizer, *options: str) -> list[str]:
    file = sources.parent / "small"
    file.write_bytes(tokenizer.json_bytes)
    unit = ["--unit-mib", "0.01", "--validation-fraction", str(FRACTION)]
    return [sys.executable, str(PROGRAM), str(sources), str(out), "--tokenizer", str(file), *unit, *options]


def test_two_mpi_ranks_give_the_bytes_of_one_process(tmp_path: Path, sources: Path, tokenizer: CorpusTokenizer) -> None:
    build(sources, tmp_path / "one", tokenizer, token_sizes=ArraySizes(2**16, 2**26))
    ended = mpiexec(program(sources, tmp_path / "out", tokenizer), 2)
    assert ended.returncode == 0, ended
    assert files_of(tmp_path / "out") == files_of(tmp_path / "one")


def test_failure_under_mpi_ends_all_ranks(tmp_path: Path, sources: Path, tokenizer: CorpusTokenizer) -> None:
    (sources / "c.jsonl.gz").write_bytes(b"plain")
    ended = mpiexec(program(sources, tmp_path / "out", tokenizer), 2)
    assert ended.returncode == 2, ended
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("build_corpus: ")]
    assert "c.jsonl.gz is damaged" in line


def worker_processes(process: subprocess.Popen[str]) -> list[psutil.Process]:
    children = psutil.Process(process.pid).children()
    return [child for child in children if "spawn_main" in " ".join(child.cmdline())]


def test_worker_that_is_killed_ends_the_build(tmp_path: Path, sources: Path, tokenizer: CorpusTokenizer) -> None:
    command = program(sources, tmp_path / "out", tokenizer, "--workers", "2")
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while len(workers := worker_processes(process)) < 2:
        assert process.poll() is None, "the build ended before its workers were there"
        time.sleep(0.01)
    workers[1].kill()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    last = errors.splitlines()[-1]
    assert f"worker process {workers[1].pid} was ended by SIGKILL" in last
    assert not any(worker.is_running() for worker in workers)


def start_and_kill(command: list[str], after_s: float, number: signal.Signals) -> int:
    """Its exit code. Fails where a worker outlives the program."""
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
    time.sleep(after_s)
    process.send_signal(number)
    code = process.wait(60)
    give_up = time.monotonic() + 30
    while time.monotonic() < give_up:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return code
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    raise AssertionError("a worker outlived the build")


@pytest.mark.timeout(60 * KILLS + 300)
def test_build_killed_at_random_instants_is_the_same(tmp_path: Path, sources: Path, tokenizer: CorpusTokenizer) -> None:
    build(sources, tmp_path / "one", tokenizer, token_sizes=ArraySizes(2**16, 2**26))
    instants = random.Random(1)
    out = tmp_path / "out"
    command = program(sources, out, tokenizer, "--workers", "2")
    for kill in range(KILLS):
        number = instants.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
        start_and_kill(command, instants.uniform(1, 5), number)
        assert not out.exists() or files_of(out) == files_of(tmp_path / "one")
        if out.exists():
            out.rename(tmp_path / f"done{kill}")
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended
    assert files_of(out) == files_of(tmp_path / "one")
    assert not out.with_name("out.partial").exists()
