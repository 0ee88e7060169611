"""Steps read ahead come in order, once each, with the errors of their reading; not more are read than are kept."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np
import pytest

from engram_data.batch import Batch, make_batch
from engram_data.errors import CorpusError
from engram_data.read_ahead import ReadAhead


def batches_of(step: int) -> list[Batch]:
    return [make_batch([np.full(4, step)], [np.empty(0, np.int64)], separate_documents=True)]


def steps_of(reader: ReadAhead) -> list[int]:
    steps = []
    while (batches := reader.take()) is not None:
        steps.append(int(batches[0].tokens[0, 0]))
    return steps


@pytest.mark.parametrize(("first", "stop"), [(0, 1), (3, 20), (5, 5), (7, 6)])
def test_every_step_is_read_once_in_order(first: int, stop: int) -> None:
    for _ in range(20):  # the thread may start late, or be ahead from the beginning
        with ReadAhead(batches_of, first, stop) as reader:
            assert steps_of(reader) == list(range(first, stop))
            assert reader.take() is None


def test_error_is_raised_for_its_own_step() -> None:
    def read(step: int) -> list[Batch]:
        if step == 2:
            raise CorpusError("chunk 7 is damaged")
        return batches_of(step)

    with ReadAhead(read, 0, 9) as reader:
        assert [reader.take() is not None for _ in range(2)] == [True, True]
        with pytest.raises(CorpusError, match="chunk 7 is damaged"):
            reader.take()


def wait_until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_no_more_is_read_than_is_kept_and_an_early_end_ends_the_thread() -> None:
    read: list[int] = []

    def note(step: int) -> list[Batch]:
        read.append(step)
        return batches_of(step)

    with ReadAhead(note, 0, 1000, depth=2) as reader:
        assert reader.take() is not None
        wait_until(lambda: len(read) >= 4)
        time.sleep(0.3)
        assert read == [0, 1, 2, 3], "one taken, two kept, one in hand"
    assert not [thread for thread in threading.enumerate() if thread.name == "read-ahead"]


def test_wait_is_that_for_a_slow_read() -> None:
    def slow(step: int) -> list[Batch]:
        time.sleep(0.2)
        return batches_of(step)

    with ReadAhead(slow, 0, 2) as reader:
        assert steps_of(reader) == [0, 1]
        assert 0.2 < reader.waited_s() < 10
        assert reader.waited_s() == 0.0
