"""Whether a run runs, hangs, waits or has ended, from what its ranks, its jobs and Slurm say of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from engram_megatron.jobs.slurm import QueuedJob
from engram_megatron.training.heartbeat import Beat
from engram_megatron.training.run_events import Event

StateName = Literal["never started", "queued", "running", "hanging", "stopped", "finished", "failed"]

# Of a rank whose beats come every second or two; slower beats are given SILENT_BEATS of them.
SILENT_S, SILENT_BEATS = 30.0, 6
# Without progress: in training, in steps and in seconds at least; in the first step, a load or a save.
STUCK_STEPS, STUCK_S, STUCK_ELSEWHERE_S = 10, 120.0, 1800.0
STARTING_S = 600.0  # from the start of ranks to their first beat: imports from a shared file system
_AFTER_RANKS = ("ended", "requeued", "gave_up", "finished", "stopped")  # events that no rank lives to see


@dataclass(frozen=True)
class State:
    """`why` adds to the name what is known: a reason, a phase, what Slurm says."""

    name: StateName
    why: str = ""


def state_of(
    beats: Sequence[Beat],
    events: Sequence[Event],
    jobs: Sequence[QueuedJob] | None,
    *,
    now: float,
    beat_every_s: float,
    is_complete: bool,
) -> State:
    """`jobs`: those of the run in Slurm's queue, None where nobody can say. `is_complete`: the last step is saved."""
    last = events[-1] if events else None
    said = max((beat.time for beat in beats), default=0.0)
    over = last is not None and last.kind in _AFTER_RANKS and last.time > said
    if not over and now - said < silent_after(beat_every_s) and any(beat.phase != "ended" for beat in beats):
        return _state_of_living(beats)
    if is_complete and (last is None or last.kind != "submitted"):
        return State("finished")
    if last is not None and last.kind == "gave_up":
        return State("failed", f"gave up: {last.fields.get('reason', '')}")
    running = [job for job in jobs or () if job.state in ("RUNNING", "COMPLETING")]
    if running:
        return _state_of_silent_job(running[0], last, said, now)
    if jobs:
        return State("queued", f"job {jobs[0].job_id} {jobs[0].state} ({jobs[0].reason})")
    return _state_without_job(beats, last, said, now, is_known_to_be_gone=jobs is not None)


def silent_after(beat_every_s: float) -> float:
    """Seconds after which a rank that said nothing is not there."""
    return max(SILENT_S, SILENT_BEATS * beat_every_s)


def _state_of_living(beats: Sequence[Beat]) -> State:
    """By the clocks of the ranks alone."""
    latest = min(beats, key=lambda beat: beat.time - beat.progress_time)
    stuck_s = latest.time - latest.progress_time
    in_steps = latest.phase in ("training", "validating") and latest.step_s > 0
    if stuck_s > (max(STUCK_S, STUCK_STEPS * latest.step_s) if in_steps else STUCK_ELSEWHERE_S):
        return State("hanging", f"no rank has gone on for {in_words(stuck_s)}, {latest.phase} after step {latest.step}")
    return State("running", latest.phase)


def _state_of_silent_job(job: QueuedJob, last: Event | None, said: float, now: float) -> State:
    limit_s = STUCK_S if last is not None and said > last.time else STARTING_S
    if last is not None and last.kind in ("started", "hang") and now - last.time > limit_s:
        silent_s = now - max(said, last.time)
        return State("hanging", f"job {job.job_id} runs, but no rank has given a sign of life for {in_words(silent_s)}")
    told = f" ({last.kind.replace('_', ' ')})" if last is not None else ""
    return State("running", f"job {job.job_id} is between two tries{told}")


def _state_without_job(
    beats: Sequence[Beat], last: Event | None, said: float, now: float, *, is_known_to_be_gone: bool
) -> State:
    if last is not None and last.kind in ("submitted", "requeued") and last.time > said:
        if is_known_to_be_gone:
            return State("failed", f"{last.kind}, but the job is no longer in Slurm's queue")
        return State("queued", f"{last.kind}; no squeue here that could say more")
    if last is not None and last.kind in ("ended", "stopped"):
        code, reason = last.fields.get("code", 0), last.fields.get("reason", "")
        return State("failed", str(reason)) if code else State("stopped", str(reason))
    if not beats:
        return State("never started") if last is None else State("failed", f"ended after {last.kind}, without a word")
    if all(beat.phase == "ended" for beat in beats):
        return State("stopped")
    return State("failed", f"no rank has given a sign of life for {in_words(now - said)}, and none has ended")


def in_words(seconds: float) -> str:
    """The two largest units: 3 d 4 h, 4 h 5 min, 5 min 6 s, 6 s."""
    minutes, s = divmod(int(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {s} s" if minutes else f"{s} s"
