"""One try: all ranks, started by srun, watched until they have ended or hang."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from engram_megatron.jobs import slurm
from engram_megatron.jobs.allocation import Allocation
from engram_megatron.jobs.frozen import Frozen
from engram_megatron.training.heartbeat import read_heartbeats
from engram_megatron.training.run_folder import RunFolder
from engram_megatron.training.stop_signal import STOP_FILE

_LOOK_S = 0.5
_LONGER = 4  # that ranks may take to start, to load or to save a checkpoint
_GRACE_S = 60  # srun's, for tasks after the first that failed; what is left of them is killed


@dataclass(frozen=True)
class Ended:
    """How a try ended. `stopped_by`: of an orderly end before the last step. `code`: srun's, or that of a hang."""

    code: int
    is_orderly: bool
    stopped_by: str | None
    hung_s: float | None = None


class TrainingStep:
    """Starts training on the nodes of `allocation`, the `number`-th try of this job."""

    def __init__(self, frozen: Frozen, allocation: Allocation, python: str, number: int) -> None:
        self.frozen, self.allocation = frozen, allocation
        self.folder = RunFolder(frozen.run_dir)
        self.started = time.time()
        where = [f"--address={allocation.nodes[0]}", f"--port={allocation.port(number)}"]
        command = srun_command(frozen, allocation, python, [*where, *frozen.train_command()])
        self._process = subprocess.Popen(command, start_new_session=True)

    def wait(self, wants_stop: Callable[[], bool], on_hang: Callable[[float], None]) -> Ended:
        """Until all ranks have ended. Once `wants_stop`, they are asked to save and end. Where none has made progress
        for too long, they are killed, after a call of `on_hang` with the seconds."""
        while self._process.poll() is None:
            if wants_stop() and not self.folder.ended_file.exists():
                (self.folder.path / STOP_FILE).touch()
            idle_s, limit_s = self._idle()
            if idle_s > limit_s:
                on_hang(idle_s)
                slurm.kill_steps(self.allocation.job_id)
                return Ended(self._process.wait(), False, None, hung_s=idle_s)
            time.sleep(_LOOK_S)
        return self._ended(self._process.returncode)

    def _idle(self) -> tuple[float, float]:
        """Seconds since a rank of this try made progress, and how many it may take for what it does."""
        beats = [beat for beat in read_heartbeats(self.folder.path) if beat.time >= self.started]
        latest = max(beats, key=lambda beat: beat.progress_time, default=None)
        hang_s = self.frozen.options.hang_s
        if latest is None or latest.phase in ("starting", "loading", "saving"):
            hang_s *= _LONGER
        return time.time() - max(self.started, latest.progress_time if latest else 0), hang_s

    def _ended(self, code: int) -> Ended:
        try:
            told = json.loads(self.folder.ended_file.read_text())
        except (OSError, ValueError):
            return Ended(code, False, None)
        if code != 0:
            return Ended(code, False, None)
        return Ended(code, True, told["stopped_by"])


def srun_command(frozen: Frozen, allocation: Allocation, python: str, arguments: Sequence[str]) -> list[str]:
    """What starts all ranks: a task per node under torchrun's agent, or a task per rank."""
    ranks, program = frozen.options.ranks_on_node, "start_ranks.py"
    command = [*allocation.tasks(), "--kill-on-bad-exit=1", f"--wait={_GRACE_S}"]
    if frozen.options.launcher == "srun":
        program = "start_rank.py"
        # The allocation counts a task per node; ranks share its cores as torchrun's would.
        tasks = [f"--ntasks={ranks * len(allocation.nodes)}", f"--ntasks-per-node={ranks}"]
        command += [*tasks, "--overcommit", "--cpu-bind=none"]
    one_task = len(allocation.nodes) == 1 and frozen.options.launcher == "torchrun"
    command.append("--unbuffered" if one_task else "--label")
    started = [python, str(frozen.code / "slurm" / program), f"--ranks={ranks}", *arguments]
    return [*command, *contained(frozen, started)]


def contained(frozen: Frozen, program: Sequence[str]) -> list[str]:
    """`program` in the job's container: words that follow srun's own."""
    options = frozen.options
    if options.container_image:
        mounts = [f"--container-mounts={options.container_mounts}"] if options.container_mounts else []
        return [f"--container-image={options.container_image}", *mounts, *program]
    if options.apptainer_image:
        binds = [f"--bind={options.container_mounts}"] if options.container_mounts else []
        gpus = ["--nv"] if options.gpus_per_node else []
        return ["apptainer", "exec", *gpus, *binds, options.apptainer_image, *program]
    return list(program)


def newest_step(run_dir: Path) -> int:
    """Of the run's complete checkpoints; 0 without one."""
    return max((int(path.name.removeprefix("step_")) for path in RunFolder(run_dir).complete_checkpoints()), default=0)
