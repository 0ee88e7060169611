"""A whole checkpoint as one of Megatron's `torch_dist` folders, tables included.

TARGET/
  latest_checkpointed_iteration.txt     the step
  iter_0000100/                         what `megatron.core.dist_checkpointing.load` reads
    <tensors of the backbone>           as in our `backbone` folder
    engram.tables.weight                [total_rows, row_dim], all rows, those too that our format leaves out;
                 .exp_avg[, .exp_avg_sq], .last_step, .learning_rates likewise
    common state                        optimizer.num_steps, iteration, checkpoint_version; under `engram_megatron`
                                        train_state and the tables' description
    manifest.json, COMPLETE             as our format has them; Megatron does not look at them
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from engram_checkpoints.backbone_reader import BackboneReader
from engram_checkpoints.backbone_writer import PIECE_BYTES, BackboneWriter, absent
from engram_checkpoints.checkpoint_files import is_complete, read_manifest
from engram_checkpoints.checkpoint_source import CheckpointSource, TableSource, row_bytes
from engram_checkpoints.read_ahead import read_ahead
from engram_checkpoints.table_format import LEARNING_RATES, Base, TableDescription
from engram_checkpoints.target_folder import TargetFolder
from engram_checkpoints.tensor_source import TensorSource
from engram_checkpoints.tensor_tables import TensorTables, row_tensors, table_tensors, tensor_name
from engram_checkpoints.train_state import TrainState
from engram_checkpoints.verified_files import VerifiedFiles
from engram_megatron.errors import UsageError
from engram_megatron.model.counts import TABLES_NAME

TRACKER = "latest_checkpointed_iteration.txt"
OURS = "engram_megatron"  # key of what is no Megatron's, in the common state
CHECKPOINT_VERSION = 3.0  # Megatron-LM's, of the layout of attention's weights


def iteration_folder(step: int) -> str:
    return f"iter_{step:07d}"


def our_state(state: TrainState, description: TableDescription | None) -> dict[str, Any]:
    """What Megatron has no place for, as plain values."""
    tables = None if description is None else asdict(description)
    return {"iteration": state.step, "checkpoint_version": CHECKPOINT_VERSION} | {
        OURS: {"train_state": asdict(state), "tables": tables}
    }


def read_our_state(folder: Path, common: dict[str, Any]) -> tuple[TrainState, TableDescription | None]:
    """Raises `UsageError` where there is none."""
    if OURS not in common:
        raise UsageError(
            f"{folder} is a checkpoint of another program: it has no {OURS} among what is no tensor, so nothing says "
            "what model it is of"
        )
    tables = common[OURS]["tables"]
    if tables is not None:
        base = tables.pop("base")
        tables = TableDescription(**tables, base=None if base is None else Base(**base))
    return TrainState(**common[OURS]["train_state"]), tables


class _Backbone:
    """The tensors that are none of the tables'."""

    def __init__(self, source: TensorSource) -> None:
        self.tensors = {n: info for n, info in source.tensors.items() if not n.startswith(f"{TABLES_NAME}.")}
        self.read = source.read


def open_torch_dist(folder: Path) -> CheckpointSource:
    """The checkpoint in the `iter_...` folder. Raises `UsageError` where it is damaged or another program's."""
    files = VerifiedFiles(folder, read_manifest(folder) if is_complete(folder) else None)
    reader = BackboneReader(folder, files)
    state, description = read_our_state(folder, reader.common)
    return CheckpointSource(
        path=folder,
        format="torch_dist",
        state=state,
        backbone=_Backbone(reader),
        num_steps=reader.num_steps,
        tables=None if description is None else TensorTables(description, reader),
    )


def write_torch_dist(
    source: CheckpointSource,
    state: TrainState,
    target: Path,
    *,
    job: dict[str, Any],
    piece_bytes: int = PIECE_BYTES,
    on_bytes: Callable[[int], None] = lambda _bytes: None,
) -> None:
    """Write `source`, with `state` as its state. See `OfflineWriter` for the arguments and what is raised."""
    folder = TargetFolder(target, job, iteration_folder(state.step))
    writer = BackboneWriter(folder.folder, folder.sums, piece_bytes, on_bytes)
    writer.add_all(source.backbone)
    description = None if source.tables is None else source.tables.description
    if source.tables is not None:
        _add_tables(writer, source.tables)
    writer.close(source.num_steps, our_state(state, description))
    folder.finish({TRACKER: f"{state.step}\n"})


def _add_tables(writer: BackboneWriter, tables: TableSource) -> None:
    tensors = table_tensors(tables.description)
    rates = tables.learning_rates()
    if rates.size:
        name = tensor_name(LEARNING_RATES)
        writer.add_rows(name, tensors.pop(name), slice(0, rates.size), torch.from_numpy(rates))
    total = tables.description.total_rows
    step = max(1, writer.piece_bytes // row_bytes(tables.description))
    spans = [slice(start, min(start + step, total)) for start in range(0, total, step)]

    def read(span: slice) -> dict[str, torch.Tensor]:
        if all(writer.has(name, info, span) for name, info in tensors.items()):
            return {name: absent(info, span) for name, info in tensors.items()}
        return row_tensors(tables.description, tables.rows(span.start, span.stop))

    for span, values in zip(spans, read_ahead(partial(read, span) for span in spans), strict=True):
        for name, info in tensors.items():
            writer.add_rows(name, info, span, values[name])
