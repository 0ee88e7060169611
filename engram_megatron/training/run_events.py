"""What happened to a run: `events.jsonl` in its folder, one line per event, in the order in which they were written.

    {"time": 1790000000.25, "job": "123.1", "event": "started", "try": 1, "step": 400, "nodes": ["n1", "n2"]}

`engram_megatron.jobs.events` appends. Events of different hosts carry the times of different clocks.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EVENTS_FILE = "events.jsonl"


@dataclass(frozen=True)
class Event:
    """Something that happened. `time` in Unix seconds; `job` as "id.requeues", "" outside Slurm."""

    time: float
    job: str
    kind: str
    fields: dict[str, Any]


def read_events(run_dir: Path) -> list[Event]:
    """All events of `run_dir`; none without a file. Lines that a crash left incomplete are skipped."""
    try:
        lines = (run_dir / EVENTS_FILE).read_bytes().splitlines()
    except FileNotFoundError:
        return []
    return [event for event in map(_parsed, lines) if event is not None]


def _parsed(line: bytes) -> Event | None:
    try:
        fields = json.loads(line)
        return Event(float(fields.pop("time")), str(fields.pop("job")), str(fields.pop("event")), fields)
    except (ValueError, KeyError, AttributeError, TypeError):
        return None
