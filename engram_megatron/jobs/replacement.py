"""The job that takes the place of one whose nodes are bad."""

from __future__ import annotations

from engram_megatron.jobs import slurm
from engram_megatron.jobs.events import Event, job_ids
from engram_megatron.jobs.frozen import Frozen
from engram_megatron.jobs.options import JobOptions
from engram_megatron.jobs.slurm import queued_jobs


def queue_elsewhere(frozen: Frozen, job_id: str, events: list[Event]) -> str:
    """Queue a job that starts when job `job_id` has ended, on none of the bad nodes of `events`; returns its id. Jobs
    of the chain that wait already are kept from these nodes, too.

    Raises `UsageError` where Slurm has no nodes left for it.
    """
    excluded = excluded_nodes(events, frozen.options.exclude)
    # The chain goes on one job at a time: each has its name, and is a singleton.
    new = slurm.submit(frozen.script, f"--exclude={excluded}", f"--dependency=singleton,afterany:{job_id}")
    for waiting in queued_jobs(job_ids(events)) or ():
        if waiting.state == "PENDING":
            try:
                slurm.exclude(waiting.job_id, excluded)
            except slurm.SlurmError as error:  # it would find them by itself
                print(f"job {waiting.job_id} is not kept from {excluded}: {error}", flush=True)
    return new


def excluded_nodes(events: list[Event], exclude: str) -> str:
    """What sbatch is told not to use: what the user said, and what preflights since the last submission found."""
    return ",".join([*([exclude] if exclude else []), *found_bad(events)])


def no_others(options: JobOptions) -> str:
    """Why a run is given up."""
    kept = f" beside --exclude {options.exclude}" if options.exclude else ""
    return f"Slurm has no {options.least_nodes} others{kept}; repair one, or go on with fewer (--min-nodes, --nodes)"


def found_bad(events: list[Event]) -> dict[str, str]:
    """Nodes that preflights since the last submission found bad, and why: what was said last."""
    found: dict[str, str] = {}
    for event in events:
        if event.kind == "submitted":
            found = {}
        found |= event.fields.get("bad_nodes", {})
    return found
