"""Events of a run come back as they were written, whoever wrote them and whatever broke off."""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path

import pytest

from engram_megatron.jobs.events import EVENTS_FILE, append_event, read_events


@pytest.fixture(autouse=True)
def outside_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)


def test_events_come_back_in_order_with_time_and_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = time.time()
    append_event(tmp_path, "submitted", preset="engram_tiny")
    monkeypatch.setenv("SLURM_JOB_ID", "123")
    append_event(tmp_path, "started", nodes=["n1", "n2"], step=0)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    append_event(tmp_path, "ended", code=1, reason="rank 3: out of memory,\n\tsaid \u201cnode n1\u201d")
    events = read_events(tmp_path)
    assert [(event.job, event.kind, event.fields) for event in events] == [
        ("", "submitted", {"preset": "engram_tiny"}),
        ("123.0", "started", {"nodes": ["n1", "n2"], "step": 0}),
        ("123.2", "ended", {"code": 1, "reason": "rank 3: out of memory,\n\tsaid \u201cnode n1\u201d"}),
    ]
    assert before <= events[0].time <= events[1].time <= events[2].time <= time.time()


def test_run_without_events_has_none(tmp_path: Path) -> None:
    assert read_events(tmp_path) == []


def test_torn_line_hides_neither_the_events_before_nor_after_it(tmp_path: Path) -> None:
    append_event(tmp_path, "started")
    with (tmp_path / EVENTS_FILE).open("a") as file:
        file.write('{"time": 1.0, "job": "", "ev')
    assert [event.kind for event in read_events(tmp_path)] == ["started"]
    append_event(tmp_path, "requeued")
    assert [event.kind for event in read_events(tmp_path)] == ["started", "requeued"]


@pytest.mark.parametrize("line", ["7", "[]", '{"time": 1.0}', '{"time": null, "job": "", "event": "x"}', "\xff"])
def test_line_that_is_no_event_is_skipped(line: str, tmp_path: Path) -> None:
    (tmp_path / EVENTS_FILE).write_bytes(line.encode("latin-1") + b"\n")
    append_event(tmp_path, "finished", step=6)
    assert [event.kind for event in read_events(tmp_path)] == ["finished"]


def _append_many(run_dir: Path, writer: int) -> None:
    for number in range(100):
        append_event(run_dir, "ended", writer=writer, number=number, text="x" * 200)


def test_processes_that_append_at_once_lose_nothing(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    writers = [fork.Process(target=_append_many, args=(tmp_path, writer)) for writer in range(4)]
    for process in writers:
        process.start()
    for process in writers:
        process.join()
    found = [(event.fields["writer"], event.fields["number"]) for event in read_events(tmp_path)]
    assert sorted(found) == [(writer, number) for writer in range(4) for number in range(100)]
    for writer in range(4):
        assert [number for w, number in found if w == writer] == list(range(100))


def test_full_disk_is_an_error_and_leaves_the_events_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    append_event(tmp_path, "started")
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, data: write(file, data[:10]))
    with pytest.raises(OSError, match="No space left"):
        append_event(tmp_path, "ended")
    monkeypatch.undo()
    append_event(tmp_path, "requeued")
    assert [event.kind for event in read_events(tmp_path)] == ["started", "requeued"]
