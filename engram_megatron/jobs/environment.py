"""What Slurm tells a process through its environment: the only module of `jobs` that reads variables."""

from __future__ import annotations

import os
from dataclasses import dataclass


def current_job() -> str:
    """Job id and number of its requeues, as "123.1"; "" outside a job."""
    job = os.environ.get("SLURM_JOB_ID", "")
    return f"{job}.{os.environ.get('SLURM_RESTART_COUNT', '0')}" if job else ""


@dataclass(frozen=True)
class Task:
    """One process of a step of srun's. Numbers count from 0, over the step and on this node."""

    number: int
    num_tasks: int
    number_on_node: int


def this_task() -> Task:
    """The task that this process is. KeyError outside of srun."""
    names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
    return Task(*(int(os.environ[name]) for name in names))
