"""What a run logs: one line per step in the file, the same numbers in TensorBoard, no overlap after a resume."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
from synthetic_run import rollback
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tiny_run import Start, metrics, run_starts, tiny_config

from engram_megatron.jobs.events import append_event
from engram_megatron.presets import engram_tiny, preset
from engram_megatron.training.board import COMPARED_KEYS, COMPARED_METRICS, compared_values, dashboard
from engram_megatron.training.metrics import MetricsLog
from engram_megatron.training.rollback_log import SKIPPED_FILE, rollback_lines
from engram_megatron.training.run_folder import RunFolder

PAGE = Path(__file__).parents[2] / "docs/watching.md"
# Of models and machines that the run here is not of.
ELSEWHERE = {"train/mtp_loss", "memory/device_gib", "local_snapshot/seconds", "local_snapshot/stall_ms"}


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


def summaries(folder: RunFolder, tag: str) -> list[tuple[int, bytes]]:
    """What a reader of the board finds under the tag of a plugin: steps and contents."""
    board = EventAccumulator(str(folder.tensorboard))
    board.Reload()
    return [(e.step, e.tensor_proto.string_val[0]) for e in board.Tensors(tag)]


def test_events_are_shown_from_all_starts(folder: RunFolder) -> None:
    append_event(folder.path, "started", nodes=["n1", "n2"])
    log_steps(folder, 0, 5)
    append_event(folder.path, "ended", code=1, reason="rank 3 | killed")
    append_event(folder.path, "started", nodes=["n1", "n4"])
    log_steps(folder, 3, 6)
    shown = summaries(folder, "events/text_summary")
    assert [step for step, _ in shown] == [0, 5, 3, 6], "at the beginning and at the end of each start"
    lines = shown[-1][1].decode().splitlines()
    assert [line.split("|")[3].strip() for line in lines[2:]] == ["started", "ended", "started"]
    assert "nodes n1 n4" in lines[2]
    assert "rank 3 \\| killed" in lines[3]


def test_rollbacks_are_shown(folder: RunFolder) -> None:
    log_steps(folder, 0, 5)
    assert "rollbacks/text_summary" not in EventAccumulator(str(folder.tensorboard)).Reload().Tags()["tensors"]
    (folder.path / SKIPPED_FILE).write_text(rollback_lines([rollback(1500), rollback(2400)]))
    log_steps(folder, 3, 6)
    (_, table), *_ = summaries(folder, "rollbacks/text_summary")
    assert [line.split("|")[2].strip() for line in table.decode().splitlines()[2:]] == ["2400", "1500"]
    assert "200 batches skipped after step 2295" in table.decode()


def test_run_is_described_once_for_all_starts(folder: RunFolder) -> None:
    for first_step in (0, 3):
        log = MetricsLog(folder, first_step=first_step, num_steps=9, output=io.StringIO())
        log.describe(engram_tiny(), num_ranks=4)
        log.close()
    board = EventAccumulator(str(folder.tensorboard))
    board.Reload()
    (layout,) = {e.tensor_proto.string_val[0] for e in board.Tensors("custom_scalars__config__")}
    titles = [category.title for category in layout_pb2.Layout.FromString(layout).category]
    assert titles == list(dashboard(engram_tiny()))
    session = HParamsPluginData.FromString(board.PluginTagToContent("hparams")["_hparams_/session_start_info"])
    shown = session.session_start_info.hparams
    assert (shown["ranks"].number_value, shown["name"].string_value) == (4, "engram_tiny")
    experiment = HParamsPluginData.FromString(board.PluginTagToContent("hparams")["_hparams_/experiment"])
    assert [info.name.tag for info in experiment.experiment.metric_infos] == list(COMPARED_METRICS)


def test_compared_keys_are_those_of_the_config() -> None:
    found = compared_values(preset("engram_27b"), 80)
    assert found.keys() == {"name", "ranks", *COMPARED_KEYS}
    assert found["engram.layer_numbers"] == "2,15"
    dense = compared_values(preset("dense_4b"), 8)
    assert set(COMPARED_KEYS) - set(dense) == {key for key in COMPARED_KEYS if key.startswith(("engram.", "model.moe"))}


def charts(name: str) -> list[str]:
    return [tag for charts in dashboard(preset(name)).values() for tags in charts.values() for tag in tags]


def test_dashboard_of_another_model_shows_no_empty_charts() -> None:
    assert not [tag for tag in charts("moe_27b") if tag.startswith(("engram", "gather", "tables"))]
    assert not [tag for tag in charts("dense_4b") if tag.startswith("moe")]
    assert r"engram/gate_mean/layer_15/.*$" in charts("engram_27b")


def test_page_explains_every_tag_of_a_run(tiny_corpus: Path, tmp_path: Path) -> None:
    short = ("training.num_steps=2", "optimizer.warmup_steps=1", "training.peak_tflops_per_rank=1")
    config = tiny_config(tiny_corpus, tmp_path / "run", *short)
    (summary, *_) = run_starts([Start(config)])[0]
    assert summary.step == 2, summary
    logged = {tag for line in metrics(tmp_path / "run") for tag in line if tag != "step"}
    shown = {re.sub(r"(layer|stream)_\d+", lambda m: f"{m[1]}_{m[1][0].upper()}", tag) for tag in logged}
    explained = set(re.findall(r"`([a-z_]+/[\w/]+)`", PAGE.read_text())) - {"job/"}
    assert shown == explained - ELSEWHERE
    drawn = [tag for charts in dashboard(config).values() for tags in charts.values() for tag in tags]
    missing = [tag for tag in drawn if not any(re.match(tag, name) for name in logged)]
    assert {tag.removesuffix("$") for tag in missing} == ELSEWHERE
