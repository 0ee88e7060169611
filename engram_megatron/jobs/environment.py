"""What Slurm tells a process through its environment: the only module of `jobs` that reads variables."""

from __future__ import annotations

import os


def current_job() -> str:
    """Job id and number of its requeues, as "123.1"; "" outside a job."""
    job = os.environ.get("SLURM_JOB_ID", "")
    return f"{job}.{os.environ.get('SLURM_RESTART_COUNT', '0')}" if job else ""
