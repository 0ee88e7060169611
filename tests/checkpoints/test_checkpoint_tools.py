"""What is told of checkpoints: their differences, what is in them, whether they are whole."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from whole_checkpoint import flip_a_byte, mark_complete, model_config, train_state

from engram_checkpoints.checkpoint_report import checkpoint_report, run_report
from engram_checkpoints.checkpoint_source import CheckpointSource
from engram_checkpoints.compare import differences, state_differences
from engram_checkpoints.convert import convert, plan_conversion
from engram_checkpoints.offline_writer import OfflineWriter
from engram_checkpoints.open_checkpoint import open_checkpoint
from engram_checkpoints.report_text import checkpoint_lines, run_lines
from engram_checkpoints.run_checkpoints import complete_checkpoints
from engram_checkpoints.tensor_source import TensorInfo
from engram_checkpoints.verify import set_aside, set_aside_damaged, verify
from engram_kernels.row_state import RowState
from engram_megatron.benchmarks.noise_checkpoint import write_noise
from engram_megatron.errors import UsageError
from engram_megatron.overrides import to_dict

HEAD = "output_layer.weight"
MOMENT = f"optimizer.exp_avg.{HEAD}"


class Changed:
    """A `TensorSource` in which some tensors are others."""

    def __init__(self, source: CheckpointSource, change: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
        self._source, self._change = source.backbone, change
        self.tensors = source.backbone.tensors

    def read(self, name: str, rows: slice = slice(None)) -> torch.Tensor:
        whole = self._change(name, self._source.read(name))
        return whole[rows] if whole.ndim else whole


def changed(
    source: CheckpointSource,
    target: Path,
    tensor: Callable[[str, torch.Tensor], torch.Tensor] = lambda _, values: values,
    row: Callable[[RowState], None] = lambda _: None,
    without: str = "",
) -> CheckpointSource:
    """Writes and opens a checkpoint that differs from `source`."""
    writer, backbone = OfflineWriter(target), Changed(source, tensor)
    for name in backbone.tensors:
        if name != without:
            writer.backbone.add(name, backbone)
    assert source.tables is not None

    def rows(start: int, stop: int) -> RowState:
        assert source.tables is not None
        values = source.tables.rows(start, stop)
        row(values)
        return values

    writer.write_tables(replace(source.tables.description, base=None), source.tables.learning_rates(), rows)
    writer.finish(source.state, source.num_steps)
    return open_checkpoint(target)


def test_differences_are_named_with_their_size(saved_checkpoint: Path, tmp_path: Path) -> None:
    a = open_checkpoint(saved_checkpoint)
    assert list(differences(a, a)) == []

    def tensor(name: str, values: torch.Tensor) -> torch.Tensor:
        if name == MOMENT:
            values[3, 5] += 2 * values.abs().max()
        if name == HEAD:
            values[0, 0] = float("nan")
        return values

    def row(rows: RowState) -> None:
        rows.weight[0, 0] += 1

    b = changed(a, tmp_path / "b", tensor, row, without="decoder.final_layernorm.weight")
    found = {difference.name: difference for difference in differences(a, b)}
    assert found.keys() == {
        MOMENT, HEAD, "decoder.final_layernorm.weight",
        "engram.tables.weight", f"engram.tables.weight as of step {a.state.step}",
    }  # fmt: skip
    assert found["decoder.final_layernorm.weight"].text == f"only in {saved_checkpoint}"
    assert "1 of 6,144 elements differ" in found[MOMENT].text
    assert found[MOMENT].relative == pytest.approx(2 / 3, rel=0.5)
    assert "1 are NaN or infinite on one side" in found[HEAD].text
    assert found[HEAD].relative is None
    assert a.tables is not None
    last_step = a.tables.last_step(0, a.tables.description.total_rows)
    stored = int(
        (last_step[:: a.tables.description.block_rows] > 0).sum()
    )  # a row without a gradient is made, not kept
    assert f"{stored} of" in found["engram.tables.weight"].text


def test_state_of_training_is_compared_but_for_where_it_ran(saved_checkpoint: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(saved_checkpoint, tmp_path / "other"))
    (other / "COMPLETE").unlink()
    config = to_dict(model_config("parallel.expert=2", "tables.block_rows=64"))
    mark_complete(other, replace(train_state(model_config(), world_size=5), tokens_seen=1, config=config))
    a, b = open_checkpoint(saved_checkpoint), open_checkpoint(other)
    assert [found.name for found in differences(a, b)] == ["tokens_seen"]
    assert [found.name for found in state_differences(a, b, config=True)] == ["config.tables.block_rows", "world_size"]


def test_report_says_what_is_there_and_what_is_wrong(saved_checkpoint: Path, tmp_path: Path) -> None:
    report = checkpoint_report(saved_checkpoint, health=True)
    assert report["health"]["problems"] == []
    assert (report["format"], report["step"], report["written_by"]["expert"]) == ("engram", 2, 2)
    weights = {tensor["name"]: tensor for tensor in report["tensors"]}
    assert weights[HEAD]["shape"] == [192, 32]
    source = open_checkpoint(saved_checkpoint)
    assert weights[HEAD]["norm"] == pytest.approx(float(source.backbone.read(HEAD).double().norm()))
    assert source.tables is not None
    touched = int((source.tables.last_step(0, source.tables.description.total_rows) > 0).sum())
    tables = report["tables"]
    assert tables["touched_rows"] == touched == tables["rows"] - tables["never_touched_rows"]
    assert 0 < touched < tables["rows"]
    assert json.loads(json.dumps(report)) == report

    def tensor(name: str, values: torch.Tensor) -> torch.Tensor:
        if name == HEAD:
            values[0, 0] = float("inf")
        return values * 0 if name == MOMENT else values

    changed(source, tmp_path / "ill", tensor, lambda rows: rows.state.__setitem__((0, 0), float("nan")))
    ill = checkpoint_report(tmp_path / "ill", health=True)
    assert f"{HEAD}: 0 NaN and 1 infinite elements" in ill["health"]["problems"]
    assert f"{HEAD}: no gradient has ever reached it" in ill["health"]["problems"]
    assert any(line.startswith("engram.tables.exp_avg: ") for line in ill["health"]["problems"])
    text = "\n".join(checkpoint_lines(ill, every_tensor=False))
    assert "experts.experts.*.linear_fc2.weight  bfloat16 [32, 16] x " in text
    assert "health       " in text


def run_of(saved_checkpoint: Path, tmp_path: Path) -> list[Path]:
    """Three checkpoints of a run, the last of which was cut short."""
    folders = [tmp_path / f"run/checkpoints/step_{step:08d}" for step in (1, 2, 3)]
    for folder in folders:
        shutil.copytree(saved_checkpoint, folder)
    (folders[2] / "COMPLETE").unlink()
    return folders


def test_checkpoints_of_a_run_are_listed(saved_checkpoint: Path, tmp_path: Path) -> None:
    run_of(saved_checkpoint, tmp_path)
    lines = list(run_lines(run_report(tmp_path / "run")))
    assert [line.split()[1].rstrip(",:") for line in lines[1:]] == ["complete", "complete", "incomplete"]


@pytest.mark.parametrize("file", ["backbone/__0_0.distcp", "tables.zarr/weight/c.0.0", "tables.zarr/zarr.json",
    "train_state.json", "manifest.json"])  # fmt: skip
def test_every_kind_of_damage_is_found(saved_checkpoint: Path, tmp_path: Path, file: str) -> None:
    whole, damaged, incomplete = run_of(saved_checkpoint, tmp_path)
    flip_a_byte(damaged / file)
    verdicts = list(verify([whole, damaged, incomplete]))
    assert [bool(verdict.problems) for verdict in verdicts] == [False, True, True]
    assert [verdict.is_complete for verdict in verdicts] == [True, True, False]
    assert str(damaged / file) in verdicts[1].problems[0]
    (damaged / file).unlink()
    assert "missing" in next(iter(verify([damaged]))).problems[0] or file == "manifest.json"


def test_damaged_checkpoint_is_set_aside_and_the_one_before_counts(saved_checkpoint: Path, tmp_path: Path) -> None:
    first, second, _ = run_of(saved_checkpoint, tmp_path)
    said: list[str] = []
    set_aside_damaged(complete_checkpoints(tmp_path / "run"), said.append)
    assert said == []
    flip_a_byte(second / "train_state.json")
    set_aside_damaged(complete_checkpoints(tmp_path / "run"), said.append)
    assert complete_checkpoints(tmp_path / "run") == [first]
    (line,) = said
    assert f"{second} is set aside as damaged: {second / 'train_state.json'} is damaged" in line
    assert "train_state.json" in (second / "DAMAGED").read_text()
    (verdict,) = verify([second])
    assert not verdict.is_complete
    assert "was set aside as damaged" in verdict.problems[0]


def delta_of(base: Path, target: Path, step_count: int = 7) -> Path:
    """A checkpoint of the rows of `base` that moved on: one in three."""
    from engram_checkpoints.checkpoint_files import MANIFEST, sum_of
    from engram_checkpoints.table_format import Base

    source = open_checkpoint(base)
    assert source.tables is not None
    identity = Base(checkpoint=base.name, step_count=step_count, manifest_crc32c=sum_of(base / MANIFEST).crc32c)
    writer = OfflineWriter(target)
    info = TensorInfo((2,), torch.float32)
    writer.backbone.add_rows("decoder.final_layernorm.weight", info, slice(0, 2), torch.ones(2))

    def rows(start: int, stop: int) -> RowState:
        assert source.tables is not None
        values = source.tables.rows(start, stop)
        values.weight[::3] += 1
        values.last_step[::3] = step_count + 1
        return values

    description = replace(source.tables.description, base=identity, step_count=step_count + 1)
    rates = torch.full((step_count + 1,), 1e-3, dtype=torch.float64).numpy()
    writer.write_tables(description, rates, rows)
    writer.finish(replace(source.state, step=step_count + 1), step_count + 1)
    return target


def test_delta_is_made_full_and_verified_with_its_base(tmp_path: Path) -> None:
    base = write_noise(tmp_path / "run/step_00000007", 4, 10_000)
    delta = delta_of(base, tmp_path / "run/step_00000008")
    plan = plan_conversion(delta, tmp_path / "full", "engram", (), 256 * 1024**2)
    convert(plan, lambda _: None, lambda _: None)
    assert checkpoint_report(delta, health=False)["tables"]["delta_of"] == "step_00000007"
    full, of_delta = open_checkpoint(tmp_path / "full"), open_checkpoint(delta)
    assert full.tables is not None
    assert full.tables.description.base is None
    assert list(differences(full, of_delta)) == []
    assert [verdict.problems for verdict in verify([delta])] == [()]
    flip_a_byte(base / "tables.zarr/exp_avg/c.1.0")
    (verdict,) = verify([delta])
    assert "its base: " in verdict.problems[0]
    assert "exp_avg/c.1.0 is damaged" in verdict.problems[0]
    shutil.rmtree(base)
    (verdict,) = verify([delta])
    assert "is a delta of" in verdict.problems[0]
    set_aside(delta, verdict.problems)
    with pytest.raises(UsageError, match="not a complete checkpoint"):
        open_checkpoint(delta)
