"""A task that ran after another had failed could be a collective that nobody else takes part in."""

import threading

import numba
import pytest

from engram_megatron.gather.worker import Worker


def _fail() -> None:
    raise ValueError("the first")


@pytest.mark.parametrize("beside", [True, False])
def test_tasks_run_in_order_and_give_their_results(beside: bool) -> None:
    worker, seen = Worker(beside=beside), []
    futures = [worker.submit("square", lambda i=i: seen.append(i) or i * i) for i in range(20)]
    assert [future.result() for future in futures] == [i * i for i in range(20)]
    assert seen == list(range(20))
    assert set(worker.take_seconds()) == {"square"}
    assert worker.take_seconds() == {}
    worker.close()


@pytest.mark.parametrize("beside", [True, False])
def test_no_task_runs_after_a_failure_and_all_tell_of_the_first(beside: bool) -> None:
    told: list[BaseException] = []
    worker, seen = Worker(beside=beside, on_failure=told.append), []
    failed = worker.submit("fail", _fail)
    later = worker.submit("later", lambda: seen.append("ran"))
    for future in (failed, later):
        with pytest.raises(ValueError, match="the first"):
            future.result()
    with pytest.raises(ValueError, match="the first"):
        worker.finish()
    assert seen == []
    assert [str(error) for error in told] == ["the first"]
    worker.close()


def test_a_task_runs_beside_its_caller() -> None:
    worker, go_on = Worker(beside=True), threading.Event()
    future = worker.submit("wait", lambda: go_on.wait(60))
    assert not future.done()
    go_on.set()
    assert future.result() is True
    worker.close()


def test_the_thread_takes_as_many_cores_as_the_rank_has() -> None:
    limit = numba.get_num_threads()
    numba.set_num_threads(1)
    try:
        worker = Worker(beside=True)
        assert worker.submit("threads", numba.get_num_threads).result() == 1
        worker.close()
    finally:
        numba.set_num_threads(limit)
