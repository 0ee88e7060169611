"""One screen says what a run does, from the folder of a run of any size and in any condition."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
from synthetic_run import NUM_STEPS, beat, rollback, write_beats, write_run

from engram_megatron.errors import UsageError
from engram_megatron.jobs.events import append_event
from engram_megatron.jobs.metrics_tail import MEAN_OF_RECORDS, metrics_tail
from engram_megatron.jobs.slurm import QueuedJob, queued_jobs
from engram_megatron.jobs.status import read_status
from engram_megatron.jobs.status_text import MOST_EVENTS, WIDTH, status_lines
from engram_megatron.training.rollback_log import SKIPPED_FILE, rollback_lines

ROOT = Path(__file__).parents[2]


def squeue(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Put a squeue of our own first on PATH."""
    folder.mkdir(exist_ok=True)
    (folder / "squeue").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


@pytest.fixture(autouse=True)
def no_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    squeue(tmp_path / "bin", monkeypatch, "exit 1")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", 2600, ranks=16)


def test_numbers_of_a_run(run: Path) -> None:
    status = read_status(run)
    assert (status.state.name, status.step, status.num_steps, status.ranks) == ("running", 2600, NUM_STEPS, 16)
    assert status.tokens == round(2600 * 5.24288e6)
    assert status.tokens_of_all_steps == NUM_STEPS * 1280 * 4096
    assert (status.tokens_per_second, status.seconds_per_step) == (2e6, 2.0)
    assert status.seconds_left == (NUM_STEPS - 2600) * 2.0
    assert status.numbers["train/loss"] == 10 / 2600
    assert status.validation == {"step": 2500, "validation/loss": 11 / 2500}
    assert (status.checkpoints, status.newest_checkpoint, status.next_checkpoint) == (2, 2000, 3000)
    assert status.newest_checkpoint_age_s is not None
    assert 0 <= status.newest_checkpoint_age_s < 60
    assert [(host.host, host.ranks, host.resident_bytes) for host in status.hosts] == [
        ("n0", 8, 24 << 30),
        ("n1", 8, 24 << 30),
    ]
    assert json.loads(json.dumps(asdict(status)))["state"] == {"name": "running", "why": "training"}


def test_slow_and_silent_ranks_are_named_with_their_hosts(run: Path) -> None:
    long_ago = time.time() - 1000
    write_beats(run, [beat(rank, step=2600, compute_s=1.0 + rank / 10) for rank in (3, 9, 4, 5, 0)])
    write_beats(run, [beat(11, step=2590, time=long_ago, progress_time=long_ago)])
    found = [(s.rank, s.host, s.slowdown, s.silent_s is not None) for s in read_status(run).stragglers]
    assert found == [(11, "n1", None, True), (9, "n1", 1.9, False), (5, "n0", 1.5, False), (4, "n0", 1.4, False)]
    assert "rank 9 on n1 1.90 x the median" in "\n".join(status_lines(read_status(run)))


def test_history_is_told_on_one_screen(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    append_event(run, "submitted", jobs=["7"], nodes=64)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    append_event(run, "preflight", bad_nodes={"n3": "/dev/shm holds 1 GiB, 4 GiB are needed"})
    for number in range(40):
        append_event(run, "started", **{"try": number}, step=number * 10, nodes=[f"n{i}" for i in range(64)])
        append_event(run, "ended", code=1, reason="out of memory\n" * 20, rank=3, host="n2")
    append_event(run, "started", **{"try": 41}, step=2000, nodes=["n0", "n1"])
    status = read_status(run)
    lines = list(status_lines(status))
    assert (len(status.starts), status.bad_nodes) == (41, {"n3": "/dev/shm holds 1 GiB, 4 GiB are needed"})
    assert "bad nodes    n3: /dev/shm holds 1 GiB, 4 GiB are needed" in lines
    assert any(line.endswith("job 7.0  from step 2000 on 2 of 64 nodes: n0 n1") for line in lines)
    assert any("reason out of memory out of memory" in line for line in lines)
    assert sum(" 7.0 " in line and "ended" in line for line in lines) <= MOST_EVENTS
    assert len(lines) < 40
    assert all(len(line) <= WIDTH for line in lines)


def test_rollbacks_are_told(run: Path) -> None:
    assert not [line for line in status_lines(read_status(run)) if line.startswith("rollbacks")]
    (run / SKIPPED_FILE).write_text(rollback_lines([rollback(1500), rollback(2400)]))
    status = read_status(run)
    (line,) = [line for line in status_lines(status) if line.startswith("rollbacks")]
    assert line.startswith(
        "rollbacks    the last of 2: back to step 2000, 200 batches skipped after step 2295 (samples "
    )
    assert len(line) <= WIDTH
    assert json.loads(json.dumps(asdict(status)))["rollbacks"][0]["step"] == 1500


def test_many_hosts_are_one_screen(run: Path) -> None:
    write_beats(run, [beat(rank, available_bytes=rank << 30) for rank in range(512)])
    status = read_status(run)
    assert (status.ranks, len(status.hosts), status.hosts[0].host) == (512, 64, "n0")
    assert len(list(status_lines(status))) < 20


def test_run_that_never_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    append_event(tmp_path, "submitted", jobs=["7", "8"])
    squeue(tmp_path / "bin", monkeypatch, 'echo "$@" > "$0.arguments"; echo "7|PENDING|Resources"')
    assert list(status_lines(read_status(tmp_path)))[1] == "state        queued: job 7 PENDING (Resources)"
    assert "--jobs=7,8" in (tmp_path / "bin/squeue.arguments").read_text()


def test_job_that_takes_the_place_of_one_with_bad_nodes_is_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append_event(tmp_path, "submitted", jobs=["7"])
    append_event(tmp_path, "requeued", reason="bad nodes n3", next_job="9")
    squeue(tmp_path / "bin", monkeypatch, 'echo "$@" > "$0.arguments"; echo "9|PENDING|Resources"')
    assert list(status_lines(read_status(tmp_path)))[1] == "state        queued: job 9 PENDING (Resources)"
    assert "--jobs=7,9" in (tmp_path / "bin/squeue.arguments").read_text()


@pytest.mark.parametrize(
    ("script", "jobs"),
    [
        ("echo 7|tr -d '\\n'; echo '|RUNNING|None'", [QueuedJob("7", "RUNNING", "None")]),
        ("true", []),
        ("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", []),
        ("echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1", None),
    ],
)
def test_what_squeue_may_say(
    script: str, jobs: list[QueuedJob] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    squeue(tmp_path / "bin", monkeypatch, script)
    assert queued_jobs(["7"]) == jobs


def test_without_slurm_nothing_is_known_of_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert queued_jobs(["7"]) is None
    assert queued_jobs([]) == []


def test_tail_of_metrics_is_that_of_the_whole_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_run(tmp_path / "run", 700, tags=5, validate_every=300) / "metrics.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()]
    with file.open("a") as torn:
        torn.write('{"step": 701, "train/lo')
    for block_bytes in (7, 100, 1 << 20):
        monkeypatch.setattr("engram_megatron.jobs.metrics_tail._BLOCK_BYTES", block_bytes)
        tail = metrics_tail(file)
        assert tail.steps == [r for r in records if "train/loss" in r][: -MEAN_OF_RECORDS - 1 : -1]
        assert tail.validation == {"step": 600, "validation/loss": 11 / 600}
    short = file.with_name("short.jsonl")
    short.write_text('{"step": 0, "validation/loss": 8.5}\n{"step": 1, "train/loss": 8.0}\n')
    assert (metrics_tail(short).steps, metrics_tail(short).validation) == (
        [{"step": 1, "train/loss": 8.0}],
        {"step": 0, "validation/loss": 8.5},
    )


@pytest.mark.parametrize("name", ["nowhere", "empty", "broken"])
def test_no_run_is_one_clear_line(name: str, tmp_path: Path) -> None:
    for folder in ("empty", "broken"):
        (tmp_path / folder).mkdir()
    (tmp_path / "broken/config.json").write_text("{")
    with pytest.raises(UsageError, match=r"does not exist|holds no run|cannot be read") as refused:
        read_status(tmp_path / name)
    assert "\n" not in str(refused.value)
    assert name in str(refused.value)


def test_program(run: Path) -> None:
    def status(*options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "slurm/status.py"), *options]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    text, as_json, nowhere = status(str(run)), status(str(run), "--json"), status(str(run / "nowhere"))
    assert "state        running: training" in text.stdout
    assert json.loads(as_json.stdout)["step"] == 2600
    assert (nowhere.returncode, nowhere.stdout, nowhere.stderr.count("\n")) == (2, "", 1)
    assert nowhere.stderr.startswith("error: ")
