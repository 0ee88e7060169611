"""From a command line to a job in Slurm's queue: checked, frozen, submitted."""

from __future__ import annotations

import hashlib
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from engram_megatron.config import RunConfig
from engram_megatron.errors import UsageError
from engram_megatron.jobs import slurm
from engram_megatron.jobs.batch_script import Job, batch_script
from engram_megatron.jobs.events import append_event
from engram_megatron.jobs.frozen import Frozen, freeze, next_folder
from engram_megatron.jobs.node_counts import NodeCounts, node_counts
from engram_megatron.jobs.options import JobOptions
from engram_megatron.overrides import apply_overrides, with_absolute_paths
from engram_megatron.presets import preset
from engram_megatron.training.preflight import open_inputs
from engram_megatron.training.run_folder import RunFolder


@dataclass(frozen=True)
class Submission:
    """A run that can be queued as jobs."""

    config: RunConfig
    frozen: Frozen
    counts: NodeCounts

    @property
    def job(self) -> Job:
        frozen = self.frozen
        return Job(
            options=frozen.options,
            name=job_name(frozen.run_dir),
            run_dir=frozen.run_dir,
            code=frozen.code,
            python=sys.executable,
        )

    def submit(self) -> list[str]:
        """Freeze it, and queue `chain` jobs; returns their ids.

        Raises `UsageError` where a job of the run is queued already, or Slurm does not take it: then nothing is left of
        it.
        """
        slurm.check_here()
        running = slurm.jobs_of_name(self.job.name)
        if running:
            told = ", ".join(f"{job_id} ({state})" for job_id, state in running.items())
            raise UsageError(f"{self.frozen.run_dir} is queued or runs already as job {told}; scancel it first")
        frozen = self.frozen
        (frozen.run_dir / "logs").mkdir(parents=True, exist_ok=True)
        try:
            freeze(frozen)
            frozen.script.write_text(batch_script(self.job))
            if not any(line.startswith(("--nodelist", "-w")) for line in frozen.options.sbatch):
                # With some of its nodes named, Slurm 22.05 tests a job as if there were no others.
                slurm.check_accepted(frozen.script)
            job_ids = [slurm.submit(frozen.script) for _ in range(frozen.options.chain)]
        except (OSError, UsageError):
            shutil.rmtree(frozen.path, ignore_errors=True)
            raise
        append_event(frozen.run_dir, "submitted", jobs=job_ids, nodes=frozen.options.nodes, submission=frozen.path.name)
        return job_ids


def prepare(preset_name: str, overrides: Sequence[str], options: JobOptions, *, resume: bool) -> Submission:
    """Check everything that can be checked before a job is queued.

    Raises:
        UsageError, CorpusError: the first thing that cannot work, in one line.
    """
    overrides = with_absolute_paths(preset(preset_name), overrides)  # jobs need not start where they were submitted
    config = apply_overrides(preset(preset_name), overrides)
    open_inputs(config, options.world_size, resume=resume)
    counts = node_counts(config, options)
    run_dir = RunFolder(config.run_dir).path
    frozen = Frozen(path=next_folder(run_dir), options=options, preset=preset_name, overrides=tuple(overrides))
    return Submission(config, frozen, counts)


def job_name(run_dir: Path) -> str:
    """Of all jobs of a run, and of no other run: Slurm runs one of them at a time (`--dependency=singleton`)."""
    return f"{run_dir.name}-{hashlib.sha256(str(run_dir).encode()).hexdigest()[:6]}"
