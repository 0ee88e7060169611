"""What a job makes of the run's events: whether there is anything to do, and when to give up."""

from __future__ import annotations

import pytest

from engram_megatron.jobs.events import Event
from engram_megatron.jobs.replacement import excluded_nodes
from engram_megatron.jobs.supervisor import fruitless_tries, lost_start, over_since_submission


def _events(text: str) -> list[Event]:
    """Kinds, a start with the step of its checkpoint: "submitted started:4 ended"."""
    events = []
    for word in text.split():
        kind, _, step = word.partition(":")
        events.append(Event(0.0, "1.0", kind, {"step": int(step)} if step else {}))
    return events


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("submitted started:0 ended", None),
        ("submitted started:0 finished", "finished"),
        ("submitted started:0 gave_up allocated", "gave_up"),
        ("submitted started:0 gave_up submitted", None),
        ("submitted stopped", "stopped"),
    ],
)
def test_run_is_over_until_it_is_submitted_again(text: str, kind: str | None) -> None:
    over = over_since_submission(_events(text))
    assert (None if over is None else over.kind) == kind


@pytest.mark.parametrize(
    ("text", "step", "count"),
    [
        ("submitted allocated", 0, 0),
        ("submitted started:0 ended", 0, 1),
        ("submitted started:0 ended started:0 ended", 0, 2),
        ("submitted started:0 ended started:0 ended", 4, 0),  # a checkpoint further
        ("submitted started:0 ended started:4 ended", 4, 1),
        ("submitted started:4 allocated started:4 ended", 4, 2),  # the first was lost with its node
        ("submitted started:4 ended requeued allocated started:4 ended", 4, 1),  # asked to stop: no fault
        ("submitted started:4 loss_spike ended started:4 loss_spike ended", 4, 0),  # rolled back twice: other samples
        ("submitted started:4 loss_spike ended started:4 ended", 4, 1),
        ("submitted started:4 ended started:4 ended gave_up submitted", 4, 0),
        ("submitted started:4 ended started:4 ended gave_up submitted started:4 ended", 4, 1),
    ],
)
def test_tries_that_came_no_further_are_counted(text: str, step: int, count: int) -> None:
    assert fruitless_tries(_events(text), step) == count


def test_nodes_that_preflights_found_bad_are_excluded_until_the_next_submission() -> None:
    found = [
        Event(0.0, "1.0", "preflight", {"bad_nodes": bad}) for bad in ({"n3": "clock"}, {}, {"n4": "x", "n3": "y"})
    ]
    assert excluded_nodes(found, "") == "n3,n4"
    assert excluded_nodes(found, "n[7-9]") == "n[7-9],n3,n4"
    assert excluded_nodes([*found, *_events("submitted")], "") == ""


@pytest.mark.parametrize(
    ("text", "is_lost"),
    [
        ("submitted", False),
        ("submitted allocated", True),
        ("submitted allocated preflight started:0", True),
        ("submitted allocated preflight started:0 hang", True),
        ("submitted allocated preflight started:0 ended requeued", False),
        ("submitted allocated preflight started:0 finished", False),
    ],
)
def test_job_that_ended_without_a_word_was_lost(text: str, is_lost: bool) -> None:
    lost = lost_start(_events(text))
    assert (lost is not None) == is_lost
    assert lost is None or lost.kind == "allocated", "the event that names its nodes"
