"""Jobs of a local Slurm cluster: submitted, and waited for."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Collection

from engram_megatron.local_cluster.settings import ClusterSettings
from engram_megatron.local_cluster.slurm_client import client_environment

COMMAND_TIMEOUT_S = 60.0


def slurm(settings: ClusterSettings, *command: str, stdin: str | None = None) -> str:
    """What one of Slurm's commands prints. AssertionError where it fails."""
    done = subprocess.run(
        command,
        input=stdin,
        env=client_environment(settings),
        capture_output=True,
        text=True,
        timeout=COMMAND_TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def submit(settings: ClusterSettings, script: str, *options: str) -> str:
    """The id of a job that runs `script`, a shell script."""
    return slurm(settings, "sbatch", "--parsable", *options, stdin=f"#!/bin/bash\n{script}\n").strip()


def job_fields(settings: ClusterSettings, job: str) -> dict[str, str]:
    """What `scontrol show job` says, such as JobState, Restarts, NodeList."""
    return dict(re.findall(r"(\S+?)=(\S*)", slurm(settings, "scontrol", "--oneliner", "show", "job", job)))


def job_state(settings: ClusterSettings, job: str) -> str:
    return job_fields(settings, job)["JobState"]


def wait_for_state(settings: ClusterSettings, job: str, states: Collection[str], timeout_s: float = 60.0) -> None:
    """Until the job is in one of `states`. AssertionError, with all that it was in, where it does not come to that."""
    seen: list[str] = []
    deadline = time.monotonic() + timeout_s
    while (state := job_state(settings, job)) not in states:
        if seen[-1:] != [state]:
            seen.append(state)
        assert time.monotonic() < deadline, f"job {job} was {seen} in {timeout_s:g} s, and not {states}"
        time.sleep(0.2)
