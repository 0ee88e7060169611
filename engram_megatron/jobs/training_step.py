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
from engram_megatron.training.heartbeat import Beat, read_heartbeats
from engram_megatron.training.run_folder import RunFolder

_LOOK_S = 0.5
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
        options = frozen.options
        ranks = [f"--ranks={options.ranks_on_node}", f"--address={allocation.nodes[0]}"]
        ranks += [f"--port={allocation.port(number)}", *frozen.train_command()]
        tasks = ["srun", f"--nodes={len(allocation.nodes)}", "--ntasks-per-node=1", "--kill-on-bad-exit=1"]
        tasks += [f"--wait={_GRACE_S}", "--label" if len(allocation.nodes) > 1 else "--unbuffered"]
        program = [python, str(frozen.code / "slurm/start_ranks.py"), *ranks]
        self._process = subprocess.Popen([*tasks, *contained(frozen, program)], start_new_session=True)

    def wait(self, wants_stop: Callable[[], bool], on_hang: Callable[[float], None]) -> Ended:
        """Until all ranks have ended. Once `wants_stop`, they are asked to save and end. Where none has made progress
        for `hang_s` seconds, they are killed, after a call of `on_hang`."""
        while self._process.poll() is None:
            if wants_stop() and not self.folder.ended_file.exists():
                self.folder.path.joinpath("STOP").touch()
            idle_s = time.time() - self._last_progress()
            if idle_s > self.frozen.options.hang_s:
                on_hang(idle_s)
                self.kill()
                return Ended(self._process.wait(), False, None, hung_s=idle_s)
            time.sleep(_LOOK_S)
        return self._ended(self._process.returncode)

    def kill(self) -> None:
        """End all ranks at once."""
        slurm.kill_steps(self.allocation.job_id)

    def _last_progress(self) -> float:
        return max([self.started, *(beat.progressed for beat in self._beats())])

    def _beats(self) -> list[Beat]:
        return [beat for beat in read_heartbeats(self.folder.path) if beat.written >= self.started]

    def _ended(self, code: int) -> Ended:
        try:
            told = json.loads(self.folder.ended_file.read_text())
        except (OSError, ValueError):
            return Ended(code, False, None)
        if code != 0:
            return Ended(code, False, None)
        return Ended(code, True, told["stopped_by"])


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
