"""What one wants to know of a run from outside: read from its folder and Slurm's queue, whoever asks, at any time.

Costs no more for a long run: of `metrics.jsonl` its end is read, and of checkpoints their names.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from engram_checkpoints.checkpoint_files import COMPLETE
from engram_checkpoints.run_checkpoints import complete_checkpoints
from engram_megatron.errors import UsageError
from engram_megatron.jobs.events import EVENTS_FILE, Event, job_ids, read_events
from engram_megatron.jobs.metrics_tail import MetricsTail, metrics_tail
from engram_megatron.jobs.replacement import found_bad
from engram_megatron.jobs.run_state import State, silent_after, state_of
from engram_megatron.jobs.slurm import queued_jobs
from engram_megatron.training.heartbeat import Beat, read_heartbeats
from engram_megatron.training.rollback_log import Rollback, read_rollbacks

SLOW = 1.15  # times the median of all ranks' compute makes a straggler
MOST_STRAGGLERS = 3


@dataclass(frozen=True)
class Straggler:
    """A rank that keeps others waiting, or says nothing. `slowdown`: its compute as a multiple of the median."""

    rank: int
    host: str
    slowdown: float | None
    silent_s: float | None


@dataclass(frozen=True)
class HostMemory:
    """Of one host: its ranks, their resident memory (pages that they share count in each), what is left of the host's
    memory, and the largest GPU memory of a rank, in bytes."""

    host: str
    ranks: int
    resident_bytes: int
    available_bytes: int
    device_bytes: int


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """`numbers`: the newest of each TensorBoard tag in the last logged step. `bad_nodes`: those that jobs since the
    last submission do without, and why. Fields that are None are not known."""

    run_dir: str
    name: str | None
    state: State
    step: int
    num_steps: int | None
    tokens: int
    tokens_of_all_steps: int | None
    tokens_per_second: float | None
    seconds_per_step: float | None
    seconds_left: float | None
    numbers: dict[str, float]
    validation: dict[str, float] | None
    checkpoints: int
    newest_checkpoint: int | None
    newest_checkpoint_age_s: float | None
    next_checkpoint: int | None
    starts: list[Event]
    bad_nodes: dict[str, str]
    events: list[Event]
    rollbacks: list[Rollback]
    ranks: int
    seen_s_ago: float | None  # any of them
    stragglers: list[Straggler]
    hosts: list[HostMemory]


def read_status(run_dir: Path) -> RunStatus:
    """The status of a run as of now.

    Raises:
        UsageError: there is no run.
    """
    config = _config(run_dir)
    now, training = time.time(), config.get("training", {})
    events, beats, tail = read_events(run_dir), read_heartbeats(run_dir), metrics_tail(run_dir / "metrics.jsonl")
    saved = complete_checkpoints(run_dir)
    newest = int(saved[-1].name.removeprefix("step_")) if saved else None
    beat_every_s, num_steps = float(training.get("heartbeat_every_s", 5.0)), training.get("num_steps")
    state = state_of(
        beats,
        events,
        queued_jobs(job_ids(events)),
        now=now,
        beat_every_s=beat_every_s,
        is_complete=newest is not None and newest == num_steps,
    )
    numbers = tail.steps[0] if tail.steps else {}
    step = max([int(numbers.get("step", 0)), newest or 0, *(beat.step for beat in beats)])
    per_step = training.get("global_batch_size", 0) * config.get("data", {}).get("sequence_length", 0)
    seconds_per_step = _seconds_per_step(beats, tail)
    return RunStatus(
        run_dir=str(run_dir),
        name=config.get("name"),
        state=state,
        step=step,
        num_steps=num_steps,
        tokens=int(numbers.get("data/tokens_seen", 0)),
        tokens_of_all_steps=num_steps * per_step if num_steps is not None else None,
        tokens_per_second=tail.mean("perf/tokens_per_second"),
        seconds_per_step=seconds_per_step,
        seconds_left=(num_steps - step) * seconds_per_step if num_steps and seconds_per_step else None,
        numbers=numbers,
        validation=tail.validation,
        checkpoints=len(saved),
        newest_checkpoint=newest,
        newest_checkpoint_age_s=now - (saved[-1] / COMPLETE).stat().st_mtime if saved else None,
        next_checkpoint=_next_checkpoint(step, num_steps, config.get("checkpoint", {}).get("every_steps", 0)),
        starts=[event for event in events if event.kind == "started"],
        bad_nodes=found_bad(events),
        events=events,
        rollbacks=read_rollbacks(run_dir),
        ranks=len(beats),
        seen_s_ago=now - max(beat.time for beat in beats) if beats else None,
        stragglers=stragglers(beats, now, beat_every_s) if state.name in ("running", "hanging") else [],
        hosts=_hosts(beats),
    )


def stragglers(beats: Sequence[Beat], now: float, beat_every_s: float) -> list[Straggler]:
    """Ranks that say nothing, longest first, and those that are slowest, by how much; at most `MOST_STRAGGLERS` each.

    A rank that waits for others in collectives of the model (experts, tensors, stages) computes as long as they do:
    then all of its group stand out.
    """
    silent = [beat for beat in beats if beat.phase != "ended" and now - beat.time > silent_after(beat_every_s)]
    found = [Straggler(beat.rank, beat.host, None, now - beat.time) for beat in sorted(silent, key=lambda b: b.time)]
    middle = median(beat.compute_s for beat in beats) if beats else 0.0
    slow = [beat for beat in beats if beat.compute_s > SLOW * middle > 0 and beat not in silent]
    slow.sort(key=lambda beat: -beat.compute_s)
    slowest = [Straggler(beat.rank, beat.host, beat.compute_s / middle, None) for beat in slow]
    return found[:MOST_STRAGGLERS] + slowest[:MOST_STRAGGLERS]


def _config(run_dir: Path) -> dict[str, Any]:
    """The resolved config of the latest start; empty before the first. Raises `UsageError` where there is no run."""
    if not run_dir.exists():
        raise UsageError(f"{run_dir} does not exist; name the run_dir of a run")
    file = run_dir / "config.json"
    if not file.exists():
        if (run_dir / EVENTS_FILE).exists() or (run_dir / "job").is_dir():
            return {}
        raise UsageError(f"{run_dir} holds no run (no config.json, {EVENTS_FILE} or job/); name the run_dir of a run")
    try:
        config: dict[str, Any] = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise UsageError(f"{file} cannot be read: {error}") from error
    return config


def _seconds_per_step(beats: Sequence[Beat], tail: MetricsTail) -> float | None:
    slowest = max((beat.step_s for beat in beats), default=0.0)
    logged = tail.mean("perf/step_ms")
    return slowest or (logged / 1e3 if logged is not None else None)


def _next_checkpoint(step: int, num_steps: int | None, every_steps: int) -> int | None:
    if num_steps is None or step >= num_steps:
        return None
    return min(num_steps, (step // every_steps + 1) * every_steps) if every_steps else num_steps


def _hosts(beats: Sequence[Beat]) -> list[HostMemory]:
    """Those with the least memory left first."""
    by_host: dict[str, list[Beat]] = {}
    for beat in beats:
        by_host.setdefault(beat.host, []).append(beat)
    hosts = [
        HostMemory(
            host=host,
            ranks=len(members),
            resident_bytes=sum(beat.rss_bytes for beat in members),
            available_bytes=min(beat.available_bytes for beat in members),
            device_bytes=max(beat.device_bytes for beat in members),
        )
        for host, members in by_host.items()
    ]
    return sorted(hosts, key=lambda host: host.available_bytes)
