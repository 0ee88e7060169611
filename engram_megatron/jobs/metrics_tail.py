"""The last numbers of a run: the end of `metrics.jsonl`, whatever the length of the file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

MEAN_OF_RECORDS = 20
MOST_BYTES = 32 << 20  # a validation that lies further back is not looked for
_BLOCK_BYTES = 1 << 20


@dataclass
class MetricsTail:
    """`steps`: the records of the last logged steps, newest first; `validation`: that of the last validation."""

    steps: list[dict[str, Any]] = field(default_factory=list)
    validation: dict[str, Any] | None = None

    def mean(self, tag: str) -> float | None:
        values = [record[tag] for record in self.steps if tag in record]
        return sum(values) / len(values) if values else None


def metrics_tail(file: Path) -> MetricsTail:
    """Empty without a file. Lines that are no records, as a killed run leaves one, are skipped."""
    tail = MetricsTail()
    try:
        handle = file.open("rb")
    except FileNotFoundError:
        return tail
    with handle:
        for line in _lines_from_the_end(handle):
            wants_steps = len(tail.steps) < MEAN_OF_RECORDS
            if not wants_steps and tail.validation is not None:
                break
            if not (wants_steps or b'"validation/loss"' in line):
                continue
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if "train/loss" in record and wants_steps:
                tail.steps.append(record)
            if "validation/loss" in record and tail.validation is None:
                tail.validation = record
    return tail


def _lines_from_the_end(handle: BinaryIO) -> Iterator[bytes]:
    """Lines, last first, of the last `MOST_BYTES`."""
    position = end = handle.seek(0, 2)
    rest = b""  # the end of a line whose beginning is not read yet
    while position > max(0, end - MOST_BYTES):
        size = min(_BLOCK_BYTES, position)
        position -= size
        handle.seek(position)
        rest, *lines = (handle.read(size) + rest).split(b"\n")
        yield from reversed(lines)
    if position == 0:
        yield rest
