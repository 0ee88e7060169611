"""What is in a checkpoint, for people and for machines."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from engram_checkpoints.checkpoint_files import is_complete
from engram_checkpoints.checkpoint_source import CheckpointSource
from engram_checkpoints.open_checkpoint import open_checkpoint
from engram_checkpoints.run_checkpoints import checkpoint_folders
from engram_checkpoints.table_reader import TableReader
from engram_checkpoints.tensor_health import Health, starved_experts, table_health, tensor_health, untrained
from engram_checkpoints.train_state import TrainState
from engram_checkpoints.verify import DAMAGED
from engram_megatron.config import RunConfig
from engram_megatron.errors import UsageError
from engram_megatron.overrides import from_dict, overrides_between
from engram_megatron.presets import preset, preset_names

Report = dict[str, Any]
_ROWS_AT_A_TIME = 1024**2  # of last steps


def run_report(run_dir: Path) -> Report:
    """The checkpoints of a run folder: step, size, complete or not, what a delta is relative to."""
    return {"run_dir": str(run_dir), "checkpoints": [_summary(folder) for folder in checkpoint_folders(run_dir)]}


def checkpoint_report(path: Path, *, health: bool, on_bytes: Callable[[int], None] = lambda _bytes: None) -> Report:
    """Of one checkpoint (see `open_checkpoint`). `health` reads every number, a piece at a time.

    Raises `UsageError` where there is none, or it is damaged.
    """
    source = open_checkpoint(path)
    state = source.state
    report: Report = {
        "path": str(source.path),
        "format": source.format,
        "bytes_on_disk": _bytes_below(source.path),
        "step": state.step,
        "tokens_seen": state.tokens_seen,
        "optimizer_steps": source.num_steps,
        "corpus": state.corpus_fingerprint,
        "tokenizer": state.tokenizer_sha256,
        "written_by": {"ranks": state.world_size, **state.config.get("parallel", {})},
        "config": _config_report(state),
        "tensors": [
            {"name": n, "shape": list(i.shape), "dtype": str(i.dtype).removeprefix("torch."), "bytes": i.num_bytes}
            for n, i in sorted(source.backbone.tensors.items())
        ],
        "tables": _tables_report(source),
    }
    if health:
        report["health"] = _health_report(source, report, on_bytes)
    return report


def _summary(folder: Path) -> Report:
    report: Report = {"path": str(folder), "bytes_on_disk": _bytes_below(folder), "complete": is_complete(folder)}
    if not report["complete"]:
        reason = folder / DAMAGED
        report["why"] = reason.read_text().splitlines()[0] if reason.is_file() else "its save was cut short"
        return report
    try:
        report["step"] = TrainState.read(folder).step
        tables = folder / "tables.zarr"
        base = TableReader(tables).description.base if tables.is_dir() else None
        report["delta_of"] = None if base is None else base.checkpoint
    except UsageError as error:
        report["why"] = str(error)
    return report


def _config_report(state: TrainState) -> Report:
    """The preset that the run was started with and its overrides; the config alone where it is no preset's."""
    name = state.config.get("name")
    if name not in preset_names():
        return {"name": name, "overrides": None}
    config: RunConfig = from_dict(RunConfig, state.config)
    return {"name": name, "overrides": overrides_between(preset(str(name)), config)}


def _tables_report(source: CheckpointSource) -> Report | None:
    if source.tables is None:
        return None
    description, touched = source.tables.description, 0
    for start in range(0, description.total_rows, _ROWS_AT_A_TIME):
        stop = min(start + _ROWS_AT_A_TIME, description.total_rows)
        touched += int((source.tables.last_step(start, stop) > 0).sum())
    return {
        "rows": description.total_rows,
        "row_dim": description.row_dim,
        "dtype": description.dtype,
        "block_rows": description.block_rows,
        "blocks": -(-description.total_rows // description.block_rows),
        "update": description.update,
        "steps": description.step_count,
        "touched_rows": touched,
        "initial": description.initial,
        "delta_of": None if description.base is None else description.base.checkpoint,
        "bytes": source.table_bytes,
    }


def _health_report(source: CheckpointSource, report: Report, on_bytes: Callable[[int], None]) -> Report:
    """Adds norms to the tensors of `report`; returns what looks wrong, a line each."""
    problems, health = [], {}
    for tensor in report["tensors"]:
        name = tensor["name"]
        health[name] = found = tensor_health(source.backbone, name)
        tensor |= {"norm": found.norm, "largest": found.largest, "nan": found.num_nan, "inf": found.num_inf}
        on_bytes(tensor["bytes"])
    arrays: dict[str, Health] = {}
    if source.tables is not None:
        arrays, never_touched = table_health(source.tables)
        on_bytes(source.table_bytes)
        report["tables"]["never_touched_rows"] = never_touched
        report["tables"]["norms"] = {name: found.norm for name, found in arrays.items()}
    for name, found in {**health, **arrays}.items():
        if (problem := found.problem()) is not None:
            problems.append(f"{name}: {problem}")
    if source.num_steps:
        problems += [f"{name}: no gradient has ever reached it" for name in untrained(source.backbone, health)]
        config: RunConfig = from_dict(RunConfig, source.state.config)
        for name, experts in starved_experts(source.backbone, config, source.num_steps).items():
            problems.append(f"{name}: experts {experts} got less than their share in nearly every step")
    return {"problems": problems}


def _bytes_below(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
