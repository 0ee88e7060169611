"""What happened to a run: `events.jsonl` in its folder, one line per event, in the order in which they were written.

    {"time": 1790000000.25, "job": "123.1", "event": "started", "try": 1, "step": 400, "nodes": ["n1", "n2"]}

Several processes may append, on a shared file system too: an event is one write. Events of different hosts carry the
times of different clocks.
"""

from __future__ import annotations

import errno
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engram_megatron.jobs.environment import current_job

EVENTS_FILE = "events.jsonl"


@dataclass(frozen=True)
class Event:
    """Something that happened. `time` in Unix seconds; `job` as "id.requeues", "" outside Slurm."""

    time: float
    job: str
    kind: str
    fields: dict[str, Any]


def append_event(run_dir: Path, kind: str, **fields: Any) -> None:
    """Append an event of this moment and job to the file of `run_dir`, which exists. `fields` are values of JSON.

    Raises:
        OSError: it could not be written (a full disk); what was written of it is skipped by readers.
    """
    assert not fields.keys() & {"time", "job", "event"}, f"reserved names among {sorted(fields)}"
    event = {"time": time.time(), "job": current_job(), "event": kind, **fields}
    file = os.open(run_dir / EVENTS_FILE, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        line = (json.dumps(event) + "\n").encode()
        if _is_torn(file):
            line = b"\n" + line
        if os.write(file, line) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(run_dir / EVENTS_FILE))
    finally:
        os.close(file)


def read_events(run_dir: Path) -> list[Event]:
    """All events of `run_dir`; none without a file. Lines that a crash left incomplete are skipped."""
    try:
        lines = (run_dir / EVENTS_FILE).read_bytes().splitlines()
    except FileNotFoundError:
        return []
    return [event for event in map(_parsed, lines) if event is not None]


def _is_torn(file: int) -> bool:
    """Whether the last line has no end."""
    size = os.fstat(file).st_size
    return size > 0 and os.pread(file, 1, size - 1) != b"\n"


def _parsed(line: bytes) -> Event | None:
    try:
        fields = json.loads(line)
        return Event(float(fields.pop("time")), str(fields.pop("job")), str(fields.pop("event")), fields)
    except (ValueError, KeyError, AttributeError, TypeError):
        return None
