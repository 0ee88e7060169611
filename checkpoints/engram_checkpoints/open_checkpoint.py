"""Finds a checkpoint at a path, whatever its format."""

from __future__ import annotations

from pathlib import Path

from engram_checkpoints.backbone_reader import BackboneReader
from engram_checkpoints.checkpoint_files import COMPLETE, read_manifest
from engram_checkpoints.checkpoint_source import CheckpointSource
from engram_checkpoints.legacy_reader import RANK_FILE, open_legacy
from engram_checkpoints.offline_writer import BACKBONE, TABLES
from engram_checkpoints.run_checkpoints import CHECKPOINTS, complete_checkpoints, is_run_folder
from engram_checkpoints.table_format import is_table_chunk
from engram_checkpoints.table_reader import TableReader
from engram_checkpoints.torch_dist_format import TRACKER, iteration_folder, open_torch_dist
from engram_checkpoints.train_state import TRAIN_STATE, TrainState
from engram_checkpoints.verified_files import VerifiedFiles
from engram_megatron.errors import UsageError


def find_checkpoint(path: Path) -> Path:
    """The folder of a checkpoint: `path` itself, the newest complete one of a run folder, or the one that Megatron's
    tracker names. Raises `UsageError` where there is none."""
    if is_run_folder(path):
        complete = complete_checkpoints(path)
        if not complete:
            raise UsageError(f"{path} has no complete checkpoint (no {CHECKPOINTS}/step_*/{COMPLETE})")
        return complete[-1]
    if (path / TRACKER).is_file():
        text = (path / TRACKER).read_text().strip()
        if not text.isdigit() or not (path / iteration_folder(int(text))).is_dir():
            raise UsageError(f"{path / TRACKER} says {text!r}, and there is no folder of such an iteration beside it")
        return path / iteration_folder(int(text))
    return path


def open_checkpoint(path: Path) -> CheckpointSource:
    """The checkpoint at `path` (see `find_checkpoint`). Files are compared with the manifest when they are first used.

    Raises `UsageError` where there is none, or it is incomplete or damaged.
    """
    folder = find_checkpoint(path)
    if (folder / TRAIN_STATE).is_file():
        return _open_ours(folder)
    if (folder / ".metadata").is_file():
        return open_torch_dist(folder)
    if any(folder.glob(f"mp_rank_*/{RANK_FILE}")):
        return open_legacy(folder)
    raise UsageError(
        f"{folder} is no checkpoint: it has no {TRAIN_STATE} (ours), no .metadata (Megatron's torch_dist) and no "
        f"mp_rank_*/{RANK_FILE} (Megatron's legacy format), and is no run folder"
    )


def _open_ours(folder: Path) -> CheckpointSource:
    state, manifest = TrainState.read(folder), read_manifest(folder)
    files = VerifiedFiles(folder, manifest)
    tables = None
    if (folder / TABLES).is_dir():
        for name in manifest:
            if name.startswith(f"{TABLES}/") and not is_table_chunk(name):  # chunks carry sums of their own
                files.check(folder / name)
        tables = TableReader(folder / TABLES)
    backbone = BackboneReader(folder / BACKBONE, files)
    return CheckpointSource(
        path=folder,
        format="engram",
        state=state,
        backbone=backbone,
        num_steps=backbone.num_steps,
        tables=tables,
    )
