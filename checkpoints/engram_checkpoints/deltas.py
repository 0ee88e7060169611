"""Delta checkpoints: which one a save is relative to, and which ones a kept delta needs.

A delta holds the table rows that changed since a full checkpoint, its base (see `table_format`); the backbone is always
whole. It is relative to a full one, never to another delta: a load reads two checkpoints at most, and a delta that is
lost costs no other. So deltas grow until the next full checkpoint; one that saves too little is not made.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from engram_checkpoints.checkpoint_files import MANIFEST, is_complete, sum_of
from engram_checkpoints.table_format import Base

TABLES = "tables.zarr"
WORTHWHILE = 0.75  # of the rows of a full save, at most: a delta is of no use without its base


def base_of(checkpoint: Path) -> Base | None:
    """What `checkpoint` is a delta of; None for a full one, one without tables, or one that cannot be read."""
    try:
        attributes = json.loads((checkpoint / TABLES / "zarr.json").read_text())["attributes"]
        return None if attributes["base"] is None else Base(**attributes["base"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def bases_of(checkpoints: Sequence[Path]) -> set[Path]:
    """The checkpoints beside them that some of `checkpoints` are deltas of."""
    bases = ((checkpoint, base_of(checkpoint)) for checkpoint in checkpoints)
    return {checkpoint.parent / base.checkpoint for checkpoint, base in bases if base is not None}


def next_base(complete: Sequence[Path], deltas_between_full: int, step_count: int) -> Base | None:
    """What the next save may be a delta of: the newest full checkpoint of `complete`, oldest first, with fewer than
    `deltas_between_full` deltas behind it. `step_count`: the tables' steps so far."""
    if not deltas_between_full or not complete:
        return None
    base = base_of(complete[-1])
    full = complete[-1] if base is None else complete[-1].parent / base.checkpoint
    deltas = [path for path in complete if (of := base_of(path)) is not None and of.checkpoint == full.name]
    if not is_complete(full) or len(deltas) >= deltas_between_full:
        return None
    full_steps = _step_count(full)
    if full_steps is None or not 0 < full_steps < step_count:
        return None
    return Base(checkpoint=full.name, step_count=full_steps, manifest_crc32c=sum_of(full / MANIFEST).crc32c)


def is_worthwhile(changed_rows: float, touched_rows: float) -> bool:
    """Whether a delta of `changed_rows` is worth having instead of a full save of all rows that ever had a gradient."""
    return changed_rows <= WORTHWHILE * touched_rows


def _step_count(checkpoint: Path) -> int | None:
    try:
        attributes = json.loads((checkpoint / TABLES / "zarr.json").read_text())["attributes"]
        return int(attributes["step_count"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
