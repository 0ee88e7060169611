"""The rollbacks of a run, `skipped_windows.jsonl` in its folder: one line for each, and what it skips.

The file is what counts. A checkpoint that has read a sample of one of these windows is not one of the run any more.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engram_data.skipped_samples import Windows, union
from engram_megatron.errors import UsageError

SKIPPED_FILE = "skipped_windows.jsonl"


@dataclass(frozen=True, kw_only=True)
class Rollback:
    """Samples at positions `first_sample` .. `stop_sample` - 1 of the order are skipped: after `window_step` updates
    the run reads on behind them. `batches`: how many it would have read of them."""

    time: float  # Unix seconds
    step: int  # in which the spike was noticed, 1-based
    reason: str
    checkpoint_step: int  # of the newest checkpoint that was left; 0: the start
    window_step: int
    batches: int
    first_sample: int
    stop_sample: int

    @property
    def details(self) -> str:
        """In one line."""
        return (
            f"back to step {self.checkpoint_step}, {self.batches:,} batches skipped after step {self.window_step} "
            f"(samples {self.first_sample:,} to {self.stop_sample - 1:,} of the order): {self.reason}"
        )


def read_rollbacks(run_dir: Path) -> list[Rollback]:
    """Oldest first; none without a file. Raises `UsageError` where somebody has damaged it."""
    file = run_dir / SKIPPED_FILE
    try:
        return [Rollback(**json.loads(line)) for line in file.read_text().splitlines()]
    except FileNotFoundError:
        return []
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"{file} is damaged ({error}); restore it: it says which samples the run leaves out"
        ) from error


def rollback_lines(rollbacks: Sequence[Rollback]) -> str:
    """The content of the file."""
    return "".join(json.dumps(asdict(rollback)) + "\n" for rollback in rollbacks)


def windows_of(rollbacks: Sequence[Rollback]) -> Windows:
    """All samples that the run leaves out."""
    return union((rollback.first_sample, rollback.stop_sample) for rollback in rollbacks)


def rollbacks_text(rollbacks: Sequence[Rollback]) -> str:
    """A table in Markdown, the newest first."""
    lines = ["| when | step | |", "|---|---|---|"]
    for rollback in reversed(rollbacks):
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(rollback.time))
        lines.append(f"| {when} | {rollback.step} | {rollback.details} |")
    return "\n".join(lines)


def as_fields(rollback: Rollback) -> dict[str, Any]:
    """Of an event."""
    fields = asdict(rollback)
    del fields["time"]
    return fields
