"""Signs of life of ranks: what they say, that reading them finds whole ones, and that they never cost a run."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from ranks import run_ranks
from tiny_run import Start, run_starts, tiny_config

from engram_megatron.training.heartbeat import Beat, Heartbeat, beat_file, read_heartbeats, remove_beats_of_others
from engram_megatron.training.run_folder import RunFolder

OFTEN_S = 0.01


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "heartbeats").mkdir()
    return tmp_path


def wait_for(run_dir: Path, what: Callable[[Beat], bool]) -> Beat:
    """The first beat of rank 0 that is so."""
    for _ in range(1000):
        found = [beat for beat in read_heartbeats(run_dir) if beat.rank == 0 and what(beat)]
        if found:
            return found[0]
        time.sleep(0.01)
    raise AssertionError(f"never came: {read_heartbeats(run_dir)}")


def test_beat_says_who_and_how_far(run_dir: Path) -> None:
    before = time.time()
    with Heartbeat(run_dir, 0, OFTEN_S, device_bytes=lambda: 7) as heartbeat:
        first = wait_for(run_dir, lambda _: True)
        heartbeat.progress(3, "loading")
        heartbeat.stepped(4, 2.0, 0.5, 1.0)
        heartbeat.stepped(5, 4.0, 0.0, 2.0)
        beat = wait_for(run_dir, lambda beat: beat.step == 5)
    assert (first.phase, first.step, first.step_s) == ("starting", 0, 0.0)
    assert (beat.host, beat.pid, beat.phase, beat.device_bytes) == (socket.gethostname(), os.getpid(), "training", 7)
    assert (beat.step_s, beat.gather_wait_s, beat.compute_s) == (3.0, 0.25, 1.5)
    assert before <= beat.progress_time <= beat.time <= time.time()
    assert beat.rss_bytes > 1 << 20
    assert beat.available_bytes > 1 << 20
    (ended,) = read_heartbeats(run_dir)
    assert (ended.phase, ended.step) == ("ended", 5)


def test_rank_that_failed_has_not_ended(run_dir: Path) -> None:
    with pytest.raises(RuntimeError), Heartbeat(run_dir, 0, OFTEN_S) as heartbeat:  # noqa: PT012
        heartbeat.progress(5, "saving")
        raise RuntimeError
    assert [(beat.phase, beat.step) for beat in read_heartbeats(run_dir)] == [("saving", 5)]


def test_rank_that_waits_beats_and_one_that_is_stopped_does_not(run_dir: Path) -> None:
    program = (
        "import sys, time\nfrom engram_megatron.training.heartbeat import Heartbeat\n"
        f"with Heartbeat(sys.argv[1], 0, {OFTEN_S}) as heartbeat:\n"
        "    heartbeat.progress(5, 'training')\n    time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(run_dir)]) as process:
        try:
            beat = wait_for(run_dir, lambda beat: beat.step == 5)
            later = wait_for(run_dir, lambda later: later.time > beat.time + 0.2)
            assert later.progress_time == beat.progress_time
            process.send_signal(signal.SIGSTOP)
            time.sleep(0.1)
            (stopped,) = read_heartbeats(run_dir)
            time.sleep(0.3)
            assert read_heartbeats(run_dir) == [stopped]
        finally:
            process.kill()


def test_beats_are_whole_while_they_are_replaced(run_dir: Path) -> None:
    with Heartbeat(run_dir, 0, 1e-6) as heartbeat:
        wait_for(run_dir, lambda _: True)
        for step in range(1000):
            heartbeat.progress(step, "training")
            assert len(read_heartbeats(run_dir)) == 1, "a reader must find the old beat or the new one"


def test_beats_that_cannot_be_written_are_dropped(run_dir: Path) -> None:
    beat_file(run_dir, 0).with_suffix(".partial").mkdir()  # every write fails
    with Heartbeat(run_dir, 0, OFTEN_S) as heartbeat:
        time.sleep(0.1)
        beat_file(run_dir, 0).with_suffix(".partial").rmdir()
        heartbeat.progress(9, "training")
        wait_for(run_dir, lambda beat: beat.step == 9)


@pytest.mark.parametrize(("folder", "interval_s"), [("", OFTEN_S), ("heartbeats", 0.0)])
def test_no_folder_or_no_interval_no_beat(tmp_path: Path, folder: str, interval_s: float) -> None:
    (tmp_path / folder).mkdir(exist_ok=True)
    with Heartbeat(tmp_path, 0, interval_s):
        time.sleep(0.1)
    assert [path.name for path in tmp_path.rglob("*")] == [folder] * bool(folder)


def test_what_is_no_beat_is_skipped_and_others_are_removed(run_dir: Path) -> None:
    for rank in (0, 1, 2, 10):
        with Heartbeat(run_dir, rank, OFTEN_S):
            pass
    for name, text in (("3", '{"rank": 3'), ("4", "[]"), ("5", '{"rank": 5}'), ("6", "")):
        (run_dir / f"heartbeats/rank_0000{name}.json").write_text(text)
    (run_dir / "heartbeats/rank_00007.partial").touch()
    assert [beat.rank for beat in read_heartbeats(run_dir)] == [0, 1, 2, 10]
    remove_beats_of_others(run_dir, 2)
    assert sorted(path.name for path in (run_dir / "heartbeats").iterdir()) == ["rank_00000.json", "rank_00001.json"]


def test_run_leaves_the_beats_of_its_ranks_alone(tiny_corpus: Path, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.heartbeats.mkdir(parents=True)
    with Heartbeat(folder.path, 2, OFTEN_S):
        pass
    config = tiny_config(tiny_corpus, folder.path, "training.num_steps=3", "checkpoint.every_steps=0")
    summary = run_starts([Start(config)])[0][0]
    beats = read_heartbeats(folder.path)
    assert [(beat.rank, beat.phase, beat.step) for beat in beats] == [(0, "ended", 3), (1, "ended", 3)], summary
    assert all(0 < beat.compute_s < beat.step_s for beat in beats)


def test_slow_rank_stands_out_where_all_ranks_take_the_same_steps() -> None:
    slow_steps, quick_steps = run_ranks(_steps_with_a_slow_rank, 2)
    for slow, quick in zip(slow_steps, quick_steps, strict=True):
        assert slow.seconds - quick.seconds < 0.3
        assert slow.compute_s > 0.6, "two microbatches of 0.3 s"
        assert quick.compute_s < slow.compute_s - 0.3


def _steps_with_a_slow_rank(rank: int, world_size: int) -> list[object]:
    from small_run import build_small_run, global_batch, microbatches, small_run_config

    from engram_megatron import platform
    from engram_megatron.training import schedule_runner

    platform.limit_threads(1)
    run = build_small_run(small_run_config(), rank, world_size)
    if rank == 0:
        forward = schedule_runner.forward_step
        schedule_runner.forward_step = lambda *a, **k: (time.sleep(0.3), forward(*a, **k))[1]  # type: ignore[assignment]
    results: list[object] = []
    for step in range(3):
        batches = microbatches(global_batch(step), run.ranks.data_rank, run.ranks.data_ranks)
        results.append(run.trainer.train_step(step, batches, stop_requested=False))
    return results[1:]  # kernels are compiled in the first
