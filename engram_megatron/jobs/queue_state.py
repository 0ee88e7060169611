"""What Slurm's queue says of the jobs of a run."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class QueuedJob:
    """A job that waits or runs. `state` and `reason` in Slurm's words: RUNNING, PENDING (Resources)."""

    job_id: str
    state: str
    reason: str


def queued_jobs(job_ids: Sequence[str]) -> list[QueuedJob] | None:
    """Those of `job_ids` that are in the queue; None where there is no squeue or it does not answer."""
    if not job_ids:
        return []
    command = ["squeue", "--noheader", "--format=%i|%T|%r", f"--jobs={','.join(job_ids)}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode != 0:
        return [] if "Invalid job id" in done.stderr else None  # what it says of a job that ended some time ago
    return [QueuedJob(*line.split("|", 2)) for line in done.stdout.splitlines() if line.count("|") >= 2]
