"""Checkpoints that a run has rolled back from: whole, but beside the way that it takes.

RUN_DIR/checkpoints/rolled_back_001/step_00000060      set aside at the first rollback; a resume does not see it
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from engram_checkpoints.checkpoint_files import sync_files
from engram_checkpoints.deltas import base_of
from engram_checkpoints.run_checkpoints import CHECKPOINTS


def rolled_back_folder(run_dir: Path, number: int) -> Path:
    """Of the `number`-th rollback, counted from 1."""
    return run_dir / CHECKPOINTS / f"rolled_back_{number:03d}"


def rolled_back_checkpoints(run_dir: Path) -> list[Path]:
    """All that were set aside, and links to what some of them are deltas of."""
    return sorted((run_dir / CHECKPOINTS).glob("rolled_back_*/step_*"))


def set_aside_in(folder: Path, checkpoints: Sequence[Path]) -> None:
    """Move `checkpoints`, newest first, to `folder` beside them. After a kill at any instant each stands in one of both
    places, and another call goes on. Where the base of a delta stays, a link to it lies beside the delta.

    Raises `OSError`.
    """
    if not checkpoints:
        return
    folder.mkdir(exist_ok=True)
    staying = {base.checkpoint for path in checkpoints if (base := base_of(path)) is not None}
    for name in sorted(staying - {path.name for path in checkpoints}):
        if not (folder / name).is_symlink():
            (folder / name).symlink_to(Path("..") / name)
    for path in checkpoints:
        path.rename(folder / path.name)
    sync_files(folder.parent, [folder.name, "."])
