"""The folder of a run that never ran: config, metrics, beats, events and checkpoints, of any size."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from engram_checkpoints.checkpoint_files import COMPLETE
from engram_megatron.overrides import to_dict
from engram_megatron.presets import preset
from engram_megatron.training.heartbeat import Beat, beat_file
from engram_megatron.training.rollback_log import Rollback
from engram_megatron.training.run_folder import RunFolder, write_json

NUM_STEPS, RANKS_PER_HOST = 50_000, 8


def beat(rank: int, **changes: Any) -> Beat:
    """That of a healthy rank in step 1,234, written now."""
    now = time.time()
    found = Beat(
        rank=rank,
        host=f"n{rank // RANKS_PER_HOST}",
        pid=1000 + rank,
        time=now,
        progress_time=now,
        step=1234,
        phase="training",
        step_s=2.0,
        gather_wait_s=0.1,
        compute_s=1.0,
        rss_bytes=3 << 30,
        available_bytes=5 << 30,
        device_bytes=0,
    )
    return replace(found, **changes)


def rollback(step: int) -> Rollback:
    """After a spike in `step`."""
    return Rollback(
        time=1790000000.0,
        step=step,
        reason=f"loss 9.1 in step {step}",
        checkpoint_step=step // 1000 * 1000,
        window_step=step - 105,
        batches=200,
        first_sample=(step - 105) * 1280,
        stop_sample=(step + 95) * 1280,
    )


def write_beats(run_dir: Path, beats: list[Beat]) -> None:
    (run_dir / "heartbeats").mkdir(parents=True, exist_ok=True)
    for found in beats:
        beat_file(run_dir, found.rank).write_text(json.dumps(asdict(found)))


def write_run(run_dir: Path, steps: int, ranks: int = 2, *, tags: int = 0, validate_every: int = 500) -> Path:
    """A run of `engram_27b` after `steps` steps, saved at every thousandth. `tags`: more numbers in each line."""
    run_dir.mkdir(parents=True, exist_ok=True)
    write_json(run_dir / "config.json", to_dict(preset("engram_27b")))
    more = {f"moe/max_load/layer_{number}": 1.2345678901234567 for number in range(tags)}
    with (run_dir / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            numbers = {"train/loss": 10 / step, "perf/tokens_per_second": 2e6, "perf/step_ms": 2621.44}
            file.write(json.dumps({"step": step, **numbers, "data/tokens_seen": step * 5.24288e6, **more}) + "\n")
            if step % validate_every == 0:
                file.write(json.dumps({"step": step, "validation/loss": 11 / step}) + "\n")
    folder = RunFolder(run_dir)
    for step in range(1000, steps + 1, 1000):
        folder.checkpoint(step).mkdir(parents=True)
        (folder.checkpoint(step) / COMPLETE).touch()
    write_beats(run_dir, [beat(rank, step=steps) for rank in range(ranks)])
    return run_dir
