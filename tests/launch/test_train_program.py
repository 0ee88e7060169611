"""`python launch/train.py` as a user starts it, on two ranks: a run, a killed rank, a stop, and their resumes.

The expensive parts are shared: an unbroken run, and the same run killed, stopped and finished in three starts.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest
from tiny_run import metrics, train_losses
from train_program import Ended, Program

NUM_STEPS = 40
STEPS = (f"training.num_steps={NUM_STEPS}", "checkpoint.every_steps=3")
RUN = (*STEPS, "--nproc-per-node=2")


@pytest.fixture(scope="module")
def straight(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ended]:
    """The run without an interruption."""
    run_dir = tmp_path_factory.mktemp("straight") / "run"
    with Program(run_dir, tiny_corpus, *RUN) as program:
        return run_dir, program.end()


@pytest.fixture(scope="module")
def killed(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, Ended]:
    """The same run; rank 1 is killed after step 5. Returns (folder, its pid, the end)."""
    run_dir = tmp_path_factory.mktemp("broken") / "run"
    with Program(run_dir, tiny_corpus, *RUN) as program:
        program.wait_for_step(5)
        victim = program.rank(1)
        victim.kill()
        return run_dir, victim.pid, program.end()


@pytest.fixture(scope="module")
def stopped(tiny_corpus: Path, killed: tuple[Path, int, Ended]) -> Ended:
    """The killed run, resumed, and stopped by SIGTERM some steps later."""
    with Program(killed[0], tiny_corpus, *RUN, "--resume") as program:
        program.wait_for_step(8)
        program.process.send_signal(signal.SIGTERM)
        return program.end()


def test_run_ends_well_and_says_nothing_on_stderr(straight: tuple[Path, Ended]) -> None:
    run_dir, ended = straight
    assert (ended.code, ended.errors, ended.left) == (0, "", [])
    assert list(train_losses(run_dir)) == list(range(1, NUM_STEPS + 1))
    assert f"checkpoint   {run_dir}/checkpoints/step_{NUM_STEPS:08d}" in ended.output


def test_killed_rank_ends_the_job_and_is_named(killed: tuple[Path, int, Ended]) -> None:
    run_dir, pid, ended = killed
    assert ended.code == 128 + signal.SIGKILL
    assert ended.seconds < 60
    assert ended.left == []
    assert f"error: rank 1 (pid {pid}) was ended by SIGKILL" in ended.errors.splitlines()[-1]
    assert (run_dir / "checkpoints/step_00000003/COMPLETE").exists()


def test_sigterm_saves_and_ends_with_0(killed: tuple[Path, int, Ended], stopped: Ended) -> None:
    assert (stopped.code, stopped.errors, stopped.left) == (0, "", [])
    last = max(train_losses(killed[0]))
    assert 8 <= last < NUM_STEPS
    assert f"stopped by SIGTERM after step {last}; continue with --resume" in stopped.output
    assert (killed[0] / f"checkpoints/step_{last:08d}/COMPLETE").exists()


def test_killed_stopped_and_finished_run_is_the_straight_one(
    tiny_corpus: Path, straight: tuple[Path, Ended], killed: tuple[Path, int, Ended], stopped: Ended
) -> None:
    assert stopped.code == 0
    with Program(killed[0], tiny_corpus, *RUN, "--resume") as program:
        ended = program.end()
    assert (ended.code, ended.errors) == (0, "")
    assert train_losses(killed[0]) == train_losses(straight[0])


@pytest.mark.slow
def test_stop_file_saves_ends_with_0_and_is_removed(tiny_corpus: Path, tmp_path: Path) -> None:
    with Program(tmp_path / "run", tiny_corpus, *RUN) as program:
        program.wait_for_step(2)
        (tmp_path / "run/STOP").touch()
        ended = program.end()
    assert (ended.code, ended.errors) == (0, "")
    assert "stopped by file STOP" in ended.output
    assert not (tmp_path / "run/STOP").exists()


@pytest.mark.slow
def test_non_finite_loss_is_one_line_with_the_step(tiny_corpus: Path, tmp_path: Path) -> None:
    with Program(tmp_path / "run", tiny_corpus, *RUN, "model.init_std=1e400") as program:
        ended = program.end()
    assert ended.code == 1
    first, second = ended.errors.splitlines()
    assert first.startswith("error: ")
    assert "in step 1; the optimizer has not moved" in first
    assert second.startswith("error: rank 0 (pid ")


@pytest.mark.slow
def test_one_process_without_a_launcher(tiny_corpus: Path, tmp_path: Path) -> None:
    with Program(tmp_path / "run", tiny_corpus, *STEPS, "parallel.expert=1") as program:
        program.wait_for_step(2)
        assert len(program.processes()) == 1
        program.process.send_signal(signal.SIGINT)
        ended = program.end()
    assert (ended.code, ended.errors) == (0, "")
    assert "stopped by SIGINT" in ended.output


@pytest.mark.slow
def test_under_torchrun_a_mistake_is_one_line_of_rank_0(tiny_corpus: Path, tmp_path: Path) -> None:
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    with Program(tmp_path / "run", tiny_corpus, "training.num_steps=2", launcher=torchrun) as program:
        assert program.end().code == 0
    with Program(tmp_path / "run", tiny_corpus, "training.num_steps=2", launcher=torchrun) as program:
        ended = program.end()
    assert ended.code != 0
    told = [line for line in ended.errors.splitlines() if line.startswith("error: ")]
    assert told == [f"error: {tmp_path}/run already holds a run; continue it with --resume or choose another run_dir"]


@pytest.mark.slow
def test_run_that_is_stopped_goes_on_in_another_layout(tiny_corpus: Path, tmp_path: Path) -> None:
    """Four ranks, TP2 x PP2, stopped by a signal; two ranks, EP2, with other microbatches and blocks of rows."""
    common = ("training.num_steps=12", "training.dtype=float32", "training.validate_every_steps=0")
    first = (*common, "--nproc-per-node=4", "parallel.tensor=2", "parallel.pipeline=2", "parallel.expert=1")
    then = (*common, "--nproc-per-node=2", "parallel.expert=2", "training.micro_batch_size=1", "tables.block_rows=100")
    with Program(tmp_path / "unbroken", tiny_corpus, *first) as program:
        assert program.end().code == 0
    with Program(tmp_path / "run", tiny_corpus, *first) as program:
        program.wait_for_step(4)
        program.process.send_signal(signal.SIGTERM)
        stopped = program.end()
    assert (stopped.code, stopped.errors) == (0, "")
    last = max(train_losses(tmp_path / "run"))
    assert 4 <= last < 12
    with Program(tmp_path / "run", tiny_corpus, *then, "--resume") as program:
        resumed = program.end()
    assert (resumed.code, resumed.errors) == (0, "")
    expected, found = train_losses(tmp_path / "unbroken"), train_losses(tmp_path / "run")
    assert list(found) == list(expected) == list(range(1, 13))
    assert [found[step] for step in range(1, last + 1)] == [expected[step] for step in range(1, last + 1)]
    # float32, rounded otherwise: measured 2e-5 after twelve steps. Other samples move most losses by more than 1e-3.
    for step in range(last + 1, 13):
        assert found[step] == pytest.approx(expected[step], rel=1e-4)
    tokens = [line["data/tokens_seen"] for line in metrics(tmp_path / "run") if "train/loss" in line]
    assert tokens == [line["data/tokens_seen"] for line in metrics(tmp_path / "unbroken") if "train/loss" in line]
