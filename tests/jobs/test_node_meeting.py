"""Words of nodes reach each other, and no wait is without an end."""

from __future__ import annotations

import threading
import time

import pytest
from ranks import free_port

from engram_megatron.errors import UsageError
from engram_megatron.jobs.node_meeting import Meeting, MeetingError


def test_words_of_those_who_came_are_heard_and_missing_ones_left_out() -> None:
    port = free_port()
    first = Meeting.join("127.0.0.1", port, 0, 3, 10, serves=True)
    second = Meeting.join("127.0.0.1", port, 1, 3, 10, serves=False)
    first.say("facts", {"a": 1})
    threading.Timer(0.3, lambda: second.say("facts", [2])).start()
    started = time.monotonic()
    assert first.hear_all("facts", range(3), 1.0) == {0: {"a": 1}, 1: [2]}
    assert 1.0 <= time.monotonic() - started < 5
    with pytest.raises(MeetingError, match=r"node 1 has not heard from node 2 \(facts\) in 0.2 s"):
        second.hear("facts", 2, 0.2)


def test_waiting_thread_does_not_hold_up_another_connection() -> None:
    meeting = Meeting.join("127.0.0.1", free_port(), 0, 2, 10, serves=True)
    other = meeting.connection()
    waiting = threading.Thread(target=lambda: other.hear("word", 1, 20))
    waiting.start()
    Meeting(meeting.connection().store, 1, 2).say("word", "")
    waiting.join(10)
    assert not waiting.is_alive()


def test_unreachable_first_node_and_taken_port_are_told() -> None:
    port = free_port()
    with pytest.raises(MeetingError, match=f"node 1 cannot reach the first node at 127.0.0.1:{port} within 1 s"):
        Meeting.join("127.0.0.1", port, 1, 2, 1, serves=False)
    kept = Meeting.join("127.0.0.1", port, 0, 2, 1, serves=True)
    with pytest.raises(UsageError, match=f"cannot listen on port {port}"):
        Meeting.join("127.0.0.1", port, 0, 2, 1, serves=True)
    del kept
