"""The file that sbatch gets: what a person would write, and can read and change."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from engram_megatron.jobs.options import JobOptions


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run as jobs of Slurm. `code`: the folder that its programs are taken from; `python`: what runs them."""

    options: JobOptions
    name: str
    run_dir: Path
    code: Path
    python: str


def batch_script(job: Job) -> str:
    """The text of the script."""
    lines = "\n".join(f"#SBATCH {line}" for line in sbatch_lines(job))
    exports = "\n".join(f"export {shlex.quote(variable)}" for variable in _environment(job))
    return f"""#!/bin/bash
{lines}

# Slurm's signal before the time limit, and a preemption's, reach run_job.py, which takes this shell's place: it has the
# ranks save and end, and puts the job back in the queue. The same file is run again then.
set -euo pipefail
{exports}
exec {shlex.quote(job.python)} {shlex.quote(str(job.code / "slurm/run_job.py"))} {shlex.quote(str(job.code.parent))}
"""


def sbatch_lines(job: Job) -> list[str]:
    """Options for sbatch, one a line."""
    options = job.options
    lines = [
        f"--job-name={job.name}",
        *_node_lines(options),
        f"--output={job.run_dir}/logs/%j.log",
        "--open-mode=append",
        "--requeue",
        f"--signal=B:USR1@{options.signal_s}",
    ]
    if options.chain > 1:
        lines.append("--dependency=singleton")
    for flag, value in (
        ("time", options.time),
        ("partition", options.partition),
        ("account", options.account),
        ("qos", options.qos),
        ("constraint", options.constraint),
        ("exclude", options.exclude),
        ("reservation", options.reservation),
        ("mem", options.memory),
        ("gpus-per-node", options.gpus_per_node),
        ("cpus-per-task", options.cpus_per_node),
    ):
        if value:
            lines.append(f"--{flag}={value}")
    return lines + list(options.sbatch)


def _node_lines(options: JobOptions) -> list[str]:
    """One task on each node; that is what Slurm takes for granted of a range, too. Told so it would count them, for the
    least number of nodes, and never give more."""
    if options.least_nodes < options.nodes:
        return [f"--nodes={options.least_nodes}-{options.nodes}"]
    return [f"--nodes={options.nodes}", "--ntasks-per-node=1"]


def _environment(job: Job) -> list[str]:
    code = job.code
    paths = ":".join(str(code / folder) for folder in (".", "kernels", "data_pipeline", "checkpoints"))
    return ["PYTHONUNBUFFERED=1", f"PYTHONPATH={paths}", *job.options.environment]
