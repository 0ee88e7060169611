"""How long slurm/status.py takes for a run of many steps and ranks, made up by the writers of a real one."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from engram_checkpoints.checkpoint_files import COMPLETE
from engram_megatron.benchmarks.cluster_run import seconds_of, wait
from engram_megatron.benchmarks.limits import Limited
from engram_megatron.jobs.events import append_event
from engram_megatron.local_cluster.settings import ClusterSettings
from engram_megatron.local_cluster.slurm_client import client_environment
from engram_megatron.overrides import apply_overrides
from engram_megatron.presets import preset
from engram_megatron.training.heartbeat import Heartbeat, beat_file
from engram_megatron.training.metrics import MetricsLog
from engram_megatron.training.run_folder import RunFolder

STATUS_S = 2.0
STEPS, RANKS = 10_000, 512
CHECKPOINT_EVERY, RESTART_EVERY, VALIDATE_EVERY = 500, 1_000, 1_000
_TAGS = ("train/grad_norm", "train/learning_rate", "perf/tokens_per_second", "perf/step_ms", "data/tokens_seen")
_MORE_TAGS = 40
_HEARTBEAT_S = 3600.0  # one beat of each rank, which the threads then wait after


def status(settings: ClusterSettings, folder: Path, repeats: int) -> Iterator[Limited]:
    """Of a run of `STEPS` steps, while its `RANKS` ranks have beaten."""
    command = [sys.executable, "slurm/status.py", str(folder / "long")]
    with ExitStack() as ranks:
        _make_run(folder / "long")
        _let_beat(folder / "long", ranks)
        wall_s, processor_s = seconds_of(command, client_environment(settings), repeats)
    yield Limited(f"status.py of {STEPS:,} steps and {RANKS} ranks", wall_s, STATUS_S)
    yield Limited("  on a processor", processor_s, STATUS_S)


def _make_run(run_dir: Path) -> None:
    folder = RunFolder(run_dir)
    config = apply_overrides(preset("engram_27b"), [f"run_dir={run_dir}", f"training.num_steps={2 * STEPS}"])
    folder.claim(config)
    log = MetricsLog(folder, first_step=0, num_steps=2 * STEPS, output=io.StringIO())
    for step in range(1, STEPS + 1):
        if step % RESTART_EVERY == 1:
            append_event(
                run_dir, "started", **{"try": 1 + step // RESTART_EVERY}, step=step - 1, nodes=["node1", "node2"]
            )
        numbers = {f"of_a_step/{number}": step / (number + 1) for number in range(_MORE_TAGS)}
        log.step(step, numbers | dict.fromkeys(_TAGS, float(step)) | {"train/loss": 2.0})
        if step % VALIDATE_EVERY == 0:
            log.validation(step, {"validation/loss": 2.0})
        if step % CHECKPOINT_EVERY == 0:
            folder.checkpoint(step).mkdir()
            (folder.checkpoint(step) / COMPLETE).touch()
    log.close()


def _let_beat(run_dir: Path, ranks: ExitStack) -> None:
    """A beat of each rank, in training. They end with `ranks`."""
    for rank in range(RANKS):
        heartbeat = Heartbeat(run_dir, rank, _HEARTBEAT_S)
        heartbeat.stepped(STEPS, 1.0, 0.01, 0.9 + rank / RANKS / 5)
        ranks.enter_context(heartbeat)
    wait(lambda: all(beat_file(run_dir, rank).exists() for rank in range(RANKS)), f"{RANKS} heartbeats", str)
