"""What happened to a run: `events.jsonl` in its folder, one line per event, in the order in which they were written.

    {"time": 1790000000.25, "job": "123.1", "event": "started", "try": 1, "step": 400, "nodes": ["n1", "n2"]}

`engram_megatron.jobs.events` appends. Events of different hosts carry the times of different clocks.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EVENTS_FILE = "events.jsonl"
MOST_NAMES = 6


@dataclass(frozen=True)
class Event:
    """Something that happened. `time` in Unix seconds; `job` as "id.requeues", "" outside Slurm."""

    time: float
    job: str
    kind: str
    fields: dict[str, Any]

    @property
    def details(self) -> str:
        """The fields in one line: "try 1, step 400, nodes n1 n2"."""
        return " ".join(", ".join(f"{name} {_in_words(value)}" for name, value in self.fields.items()).split())


def read_events(run_dir: Path) -> list[Event]:
    """All events of `run_dir`; none without a file. Lines that a crash left incomplete are skipped."""
    try:
        lines = (run_dir / EVENTS_FILE).read_bytes().splitlines()
    except FileNotFoundError:
        return []
    return [event for event in map(_parsed, lines) if event is not None]


def in_short(names: Sequence[str]) -> str:
    """The names, or the first few and the last of many."""
    if len(names) > MOST_NAMES:
        return f"{' '.join(names[: MOST_NAMES - 1])} ... {names[-1]}"
    return " ".join(names) or "none"


def _in_words(value: Any) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{name} ({_in_words(inner)})" for name, inner in value.items()) or "none"
    if isinstance(value, list):
        return in_short([_in_words(inner) for inner in value])
    return str(value)


def _parsed(line: bytes) -> Event | None:
    try:
        fields = json.loads(line)
        return Event(float(fields.pop("time")), str(fields.pop("job")), str(fields.pop("event")), fields)
    except (ValueError, KeyError, AttributeError, TypeError):
        return None
