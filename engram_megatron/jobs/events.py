"""Append to what happened to a run (`training.run_events`). Several processes may, on a shared file system too: an
event is one write."""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engram_megatron.jobs.environment import current_job
from engram_megatron.training.run_events import EVENTS_FILE, Event, read_events

__all__ = ["EVENTS_FILE", "Event", "append_event", "job_ids", "read_events"]


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


def job_ids(events: Sequence[Event]) -> list[str]:
    """Slurm's ids of the run's jobs: of the last submission and after; without one of all events."""
    since = max((index for index, event in enumerate(events) if event.kind == "submitted"), default=0)
    jobs = [event.job.partition(".")[0] for event in events[since:]]
    for event in events[since:]:
        jobs += [str(job) for job in (*event.fields.get("jobs", []), event.fields.get("next_job", ""))]
    return sorted({job for job in jobs if job})


def _is_torn(file: int) -> bool:
    """Whether the last line has no end."""
    size = os.fstat(file).st_size
    return size > 0 and os.pread(file, 1, size - 1) != b"\n"
