"""The checkpoints of a run folder, by the names of their folders."""

from __future__ import annotations

from pathlib import Path

from engram_checkpoints.checkpoint_files import is_complete

CHECKPOINTS = "checkpoints"


def is_run_folder(path: Path) -> bool:
    return (path / CHECKPOINTS).is_dir()


def checkpoint_folders(run_dir: Path) -> list[Path]:
    """All, complete or not, oldest first."""
    return sorted(path for path in (run_dir / CHECKPOINTS).glob("step_*") if path.is_dir())


def complete_checkpoints(run_dir: Path) -> list[Path]:
    """Those that count, oldest first."""
    return [path for path in checkpoint_folders(run_dir) if is_complete(path)]
