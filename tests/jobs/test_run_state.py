"""The state of a run is told from its beats, its events and Slurm's queue, each of which may be missing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from synthetic_run import beat

from engram_megatron.jobs.run_state import in_words, state_of
from engram_megatron.jobs.slurm import QueuedJob
from engram_megatron.training.heartbeat import Beat
from engram_megatron.training.run_events import Event

NOW = 1_000_000.0
RUNNING, PENDING = QueuedJob("7", "RUNNING", "None"), QueuedJob("7", "PENDING", "Resources")


def beats(*ages_s: float, **changes: Any) -> list[Beat]:
    """One rank per age of its last beat; progress was then, too."""
    return [
        replace(beat(rank), **{"time": NOW - age, "progress_time": NOW - age, **changes})
        for rank, age in enumerate(ages_s)
    ]


def events(*kinds: str, age_s: float = 1.0, **fields: Any) -> list[Event]:
    """The last of them `age_s` ago, with `fields`."""
    return [Event(NOW - age_s, "7.0", kind, fields if kind == kinds[-1] else {}) for kind in kinds]


STARTED = events("submitted", "allocated", "started", age_s=3600)
CASES: dict[str, tuple[list[Beat], list[Event], list[QueuedJob] | None, bool, str, str]] = {
    # beats, events, jobs in the queue, last step saved; name and a part of why
    "nothing": ([], [], None, False, "never started", ""),
    "waits": ([], events("submitted"), [PENDING], False, "queued", "job 7 PENDING (Resources)"),
    "waits, unseen": ([], events("submitted"), None, False, "queued", "no squeue"),
    "cancelled in the queue": ([], events("submitted"), [], False, "failed", "no longer in Slurm's queue"),
    "preflight": ([], events("submitted", "allocated"), [RUNNING], False, "running", "between two tries (allocated)"),
    "loads": (beats(1, 2, phase="loading", progress_time=NOW - 900), STARTED, [RUNNING], False, "running", "loading"),
    "by hand": (beats(1, 2), [], None, False, "running", "training"),
    "submitted": (beats(1, 2), STARTED, [RUNNING], False, "running", "training"),
    "one rank silent": (beats(1, 600), STARTED, [RUNNING], False, "running", "training"),
    "all wait": (beats(1, 2, progress_time=NOW - 300), STARTED, [RUNNING], False, "hanging", "for 4 min 58 s"),
    "first step is slow": (beats(1, progress_time=NOW - 300, step_s=0.0), [], None, False, "running", "training"),
    "long steps": (beats(1, progress_time=NOW - 300, step_s=60.0), [], None, False, "running", "training"),
    "all silent": (beats(300, 300), STARTED, [RUNNING], False, "hanging", "job 7 runs, but no rank"),
    "starts": ([], events("started", age_s=300), [RUNNING], False, "running", "(started)"),
    "never comes up": (beats(5000), events("started", age_s=900), [RUNNING], False, "hanging", "for 15 min 0 s"),
    "between tries": (beats(9, 9), events("started", "ended", code=1), [RUNNING], False, "running", "(ended)"),
    "killed by hand": (beats(7200, 7300), [], None, False, "failed", "for 2 h 0 min, and none has ended"),
    "job lost": (beats(7200), events("started", age_s=9000), [], False, "failed", "no rank has given a sign of life"),
    "stopped by hand": (beats(1, 2, phase="ended"), [], None, False, "stopped", ""),
    "stopped": (beats(9, phase="ended"), events("ended", "stopped"), [], False, "stopped", ""),
    "failed": (beats(9), events("started", "ended", code=1, reason="rank 3"), [], False, "failed", "rank 3"),
    "gave up": (beats(9), events("ended", "gave_up", reason="3 tries"), [], False, "failed", "gave up: 3 tries"),
    "requeued": (beats(99, phase="ended"), events("requeued"), [PENDING], False, "queued", "PENDING"),
    "finished by hand": (beats(9, phase="ended"), [], None, True, "finished", ""),
    "finished": (beats(9, phase="ended"), events("started", "finished"), [PENDING], True, "finished", ""),
}


@pytest.mark.parametrize("case", CASES)
def test_state(case: str) -> None:
    found_beats, found_events, jobs, is_complete, name, why = CASES[case]
    state = state_of(found_beats, found_events, jobs, now=NOW, beat_every_s=5.0, is_complete=is_complete)
    assert state.name == name, state
    assert why in state.why


def test_rarely_beating_ranks_are_not_taken_for_dead() -> None:
    found = [state_of(beats(100), [], None, now=NOW, beat_every_s=s, is_complete=False).name for s in (5.0, 60.0)]
    assert found == ["failed", "running"]


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 s"), (-3, "0 s"), (61, "1 min 1 s"), (3600, "1 h 0 min"), (90_000, "1 d 1 h")],
)
def test_durations(seconds: float, words: str) -> None:
    assert in_words(seconds) == words
