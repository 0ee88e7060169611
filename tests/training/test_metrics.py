"""What a run logs: one line per step in the file, the same numbers in TensorBoard, no overlap after a resume."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from engram_megatron.presets import engram_tiny
from engram_megatron.training.metrics import MetricsLog
from engram_megatron.training.run_folder import RunFolder


def values(loss: float) -> dict[str, float]:
    return {"train/loss": loss, "train/grad_norm": 1.5, "train/learning_rate": 1e-3, "perf/tokens_per_second": 1234.5}


def log_steps(folder: RunFolder, first_step: int, last_step: int, offset: float = 0.0) -> str:
    """A start that logs steps first_step + 1 .. last_step and validates before and after; returns what it prints."""
    output = io.StringIO()
    log = MetricsLog(folder, first_step=first_step, num_steps=9, output=output)
    log.validation(first_step, {"validation/loss": first_step + 0.5})
    for step in range(first_step + 1, last_step + 1):
        log.step(step, values(step + offset))
    log.validation(last_step, {"validation/loss": last_step + 0.5})
    log.close()
    return output.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    run = RunFolder(tmp_path / "run")
    run.claim(engram_tiny())
    return run


def lines(folder: RunFolder) -> list[tuple[int, float]]:
    records = [json.loads(line) for line in folder.metrics_file.read_text().splitlines()]
    return [(r["step"], r.get("train/loss", r.get("validation/loss"))) for r in records]


def test_progress_line_names_what_one_watches(folder: RunFolder) -> None:
    first, second, *_ = log_steps(folder, 0, 1).splitlines()
    assert first == "step      0/9 | validation loss 0.5000"
    assert second.startswith("step      1/9 | loss 1.0000 | grad norm 1.500 | lr 1.00e-03 | 1,234 tok/s | eta 0:0")


def test_resume_drops_later_steps_and_logs_none_twice(folder: RunFolder) -> None:
    log_steps(folder, 0, 5)
    with folder.metrics_file.open("a") as stream:
        stream.write('{"step": 6, "train/lo')  # the run was killed here
    log_steps(folder, 3, 6, offset=0.25)
    expected = [(0, 0.5), (1, 1.0), (2, 2.0), (3, 3.0), (3, 3.5), (4, 4.25), (5, 5.25), (6, 6.25), (6, 6.5)]
    assert lines(folder) == expected


def test_validation_of_the_checkpoints_step_is_printed_again_but_logged_once(folder: RunFolder) -> None:
    log_steps(folder, 0, 3)
    assert "step      3/9 | validation loss 3.5000" in log_steps(folder, 3, 4)
    assert lines(folder).count((3, 3.5)) == 1


def test_tensorboard_shows_the_same_numbers_without_overlap(folder: RunFolder) -> None:
    log_steps(folder, 0, 5)
    log_steps(folder, 3, 6, offset=0.25)
    board = EventAccumulator(str(folder.tensorboard))
    board.Reload()
    assert [(e.step, e.value) for e in board.Scalars("train/loss")] == [
        *((1, 1.0), (2, 2.0), (3, 3.0)),
        *((4, 4.25), (5, 5.25), (6, 6.25)),
    ]
    assert [(e.step, e.value) for e in board.Scalars("validation/loss")] == [(0, 0.5), (3, 3.5), (6, 6.5)]
