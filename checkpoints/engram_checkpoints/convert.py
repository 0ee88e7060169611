"""One checkpoint into another: of another format, in other blocks of rows, a delta made full. One process, no GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engram_checkpoints.backbone_writer import PIECE_BYTES
from engram_checkpoints.checkpoint_files import MANIFEST, sum_of
from engram_checkpoints.checkpoint_source import CheckpointSource, Format, TableSource, row_bytes
from engram_checkpoints.legacy_writer import LegacyWriter
from engram_checkpoints.offline_writer import OfflineWriter
from engram_checkpoints.open_checkpoint import open_checkpoint
from engram_checkpoints.table_format import TableDescription
from engram_checkpoints.target_folder import TargetFolder
from engram_checkpoints.torch_dist_format import write_torch_dist
from engram_checkpoints.train_state import TrainState
from engram_megatron.config import RunConfig
from engram_megatron.errors import UsageError
from engram_megatron.overrides import apply_overrides, from_dict, leaves, to_dict

# Beside a piece as it was read lie the next one, its copy in the target's order, and what is being written. A block of
# rows is in memory as stored, decoded and as asked for, once more for the base of a delta; and while it is written,
# with others that wait.
_COPIES_OF_PIECE = 5
_READ_COPIES, _WRITE_COPIES = 4, 7


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What `convert` is about to do."""

    source: CheckpointSource
    state: TrainState  # of the target
    block_rows: int  # of the target; 0 without tables
    target: Path
    to: Format
    piece_bytes: int

    @property
    def job(self) -> dict[str, Any]:
        """By which a second try knows the first."""
        manifest = self.source.path / MANIFEST
        return {
            "source": str(self.source.path.resolve()),
            "manifest": sum_of(manifest) if manifest.is_file() else None,
            "to": self.to,
            "piece_bytes": self.piece_bytes,
            "config": self.state.config,
        }


def plan_conversion(source: Path, target: Path, to: Format, overrides: Sequence[str], memory_bytes: int) -> Conversion:
    """Open the source and check everything that can be checked before the work.

    `overrides`: `key=value` of tables.block_rows and parallel.*. `memory_bytes`: of tensors at a time.

    Raises:
        UsageError: no checkpoint, a damaged one, an unknown key, or too little memory for a block of rows.
    """
    opened = open_checkpoint(source)
    state = _with_overrides(opened.state, overrides)
    block_rows = 0
    if opened.tables is not None:
        block_rows = state.config["tables"]["block_rows"] if overrides else opened.tables.description.block_rows
        _check_memory(opened.tables.description, block_rows, to, memory_bytes)
    return Conversion(
        source=opened,
        state=state,
        block_rows=block_rows,
        target=target,
        to=to,
        piece_bytes=max(1, min(PIECE_BYTES, memory_bytes // 2 // _COPIES_OF_PIECE)),
    )


def convert(plan: Conversion, on_start: Callable[[int], None], on_bytes: Callable[[int], None]) -> None:
    """Do it. `on_start` is told of the bytes of all tensors, `on_bytes` of those that are done, those too that an
    earlier try has done.

    Raises:
        UsageError: something stands at the target, or a piece of the source is missing or damaged.
    """
    if TargetFolder.is_finished(plan.target, plan.job):  # killed before it could say so
        TargetFolder.forget(plan.target)
        on_start(0)
        return
    source = _with_block_rows(plan.source, plan.block_rows)
    if plan.to == "legacy":
        writer = LegacyWriter(source, plan.state, piece_bytes=plan.piece_bytes, on_bytes=on_bytes)
        on_start(writer.num_bytes)
        writer.write(plan.target, plan.job)
        return
    on_start(source.num_bytes)
    if plan.to == "torch_dist":
        write_torch_dist(source, plan.state, plan.target, job=plan.job, piece_bytes=plan.piece_bytes, on_bytes=on_bytes)
        return
    _write_ours(source, plan, on_bytes)


def _write_ours(source: CheckpointSource, plan: Conversion, on_bytes: Callable[[int], None]) -> None:
    writer = OfflineWriter(plan.target, plan.job, plan.piece_bytes, on_bytes)
    writer.backbone.add_all(source.backbone)
    if source.tables is not None:
        writer.write_tables(source.tables.description, source.tables.learning_rates(), source.tables.rows)
    writer.finish(plan.state, source.num_steps)


def _with_overrides(state: TrainState, overrides: Sequence[str]) -> TrainState:
    if not overrides:
        return state
    before: RunConfig = from_dict(RunConfig, state.config)
    after = apply_overrides(before, overrides)
    was = {key: value for key, value, _ in leaves(before)}
    for key, value, _ in leaves(after):
        if was[key] != value and key != "tables.block_rows" and not key.startswith("parallel."):
            raise UsageError(f"{key} cannot be set: a conversion changes parallel.* and tables.block_rows alone")
    after.validate()
    return replace(state, config=to_dict(after))


def _with_block_rows(source: CheckpointSource, block_rows: int) -> CheckpointSource:
    """The same rows as those of a full checkpoint, in other blocks."""
    if source.tables is None:
        return source
    description = replace(source.tables.description, block_rows=block_rows, base=None)
    return replace(source, tables=_Reblocked(description, source.tables))


class _Reblocked:
    """A `TableSource` with another description."""

    def __init__(self, description: TableDescription, tables: TableSource) -> None:
        self.description = description
        self.rows, self.last_step, self.learning_rates = tables.rows, tables.last_step, tables.learning_rates


def _check_memory(description: TableDescription, block_rows: int, to: Format, memory_bytes: int) -> None:
    rows = _READ_COPIES * description.block_rows * (1 if description.base is None else 2)
    rows += _WRITE_COPIES * block_rows if to != "torch_dist" else 0
    needed = row_bytes(description) * rows
    if needed > memory_bytes // 2:
        raise UsageError(
            f"blocks of {description.block_rows} rows in the source and {block_rows} in the target take "
            f"{2 * needed / 1024**3:.2f} GiB, --memory-gib is {memory_bytes / 1024**3:.2f}; give more, or set "
            "a smaller tables.block_rows"
        )
