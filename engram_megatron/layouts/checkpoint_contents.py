"""What a checkpoint holds, whoever wrote it: global tensors and rows by name, read without a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from engram_checkpoints.backbone_reader import BackboneReader
from engram_checkpoints.table_reader import TableReader

BACKBONE, TABLES = "backbone", "tables.zarr"


def checkpoint_contents(folder: Path) -> dict[str, torch.Tensor]:
    """Weights, optimizer state, router biases and step count of the backbone in `folder`, and all of its tables."""
    backbone = BackboneReader(folder / BACKBONE)
    contents = {name: backbone.read(name) for name in backbone.tensors}
    contents["num_steps"] = torch.tensor(backbone.num_steps)
    if (folder / TABLES).exists():
        contents |= {f"tables.{name}": torch.from_numpy(values) for name, values in _tables(folder / TABLES).items()}
    return contents


def first_difference(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> str | None:
    """The name of a tensor that is not the same bit for bit, or on one side only; None: there is none."""
    alone = sorted(set(ours) ^ set(theirs))
    changed = (name for name, tensor in sorted(theirs.items()) if not _same_bits(ours[name], tensor))
    return alone[0] if alone else next(changed, None)


def _same_bits(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    if ours.dtype != theirs.dtype or ours.shape != theirs.shape:
        return False
    return torch.equal(*(tensor.contiguous().flatten().view(torch.uint8) for tensor in (ours, theirs)))


def _tables(path: Path) -> dict[str, np.ndarray]:
    """Rows as of their last step, those that are left out too; the learning rates, and what else is said of them, as
    bytes. The size of blocks belongs to the layout."""
    reader = TableReader(path)
    rows = reader.rows(0, reader.description.total_rows)
    said = {name: value for name, value in asdict(reader.description).items() if name != "block_rows"}
    return {
        "weight": rows.weight,
        **dict(zip(reader.description.moments, np.hsplit(rows.state, rows.moments), strict=True)),
        "last_step": rows.last_step,
        "learning_rates": reader.learning_rates(),
        "description": np.frombuffer(repr(sorted(said.items())).encode(), np.uint8).copy(),
    }
