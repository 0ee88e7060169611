"""Whether checkpoints are whole: every file against the manifest, deltas with what they are relative to."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from engram_checkpoints.checkpoint_files import COMPLETE, FileSum, damages, is_complete, read_manifest, sync_files
from engram_checkpoints.offline_writer import TABLES
from engram_checkpoints.open_checkpoint import find_checkpoint
from engram_checkpoints.run_checkpoints import checkpoint_folders, is_run_folder
from engram_checkpoints.table_reader import TableReader
from engram_megatron.errors import UsageError

DAMAGED = "DAMAGED"  # in the place of COMPLETE, with the reasons


@dataclass(frozen=True)
class Verdict:
    """On one checkpoint: what is wrong with it, a line each. `is_complete`: COMPLETE stood in it."""

    path: Path
    is_complete: bool
    num_bytes: int
    problems: tuple[str, ...]


def checkpoints_at(path: Path) -> list[Path]:
    """The folders that `path` names: all of a run folder, else one. Raises `UsageError` where there is none."""
    folders = checkpoint_folders(path) if is_run_folder(path) else [find_checkpoint(path)]
    if not folders or not folders[0].is_dir():
        raise UsageError(f"{path} holds no checkpoint")
    return folders


def manifest_bytes(folder: Path) -> int:
    """Of all files of a checkpoint; 0 where nothing says so."""
    try:
        return sum(file_sum.bytes for file_sum in read_manifest(folder).values())
    except UsageError:
        return 0


def verify(folders: list[Path], on_bytes: Callable[[int], None] = lambda _bytes: None) -> Iterator[Verdict]:
    """One verdict for each of `folders`. No file is read twice, and none decoded but the description of tables."""
    known: dict[Path, tuple[str, ...]] = {}
    for folder in folders:
        complete = is_complete(folder)
        problems = _problems(folder, known, on_bytes) if complete else (_incomplete(folder),)
        yield Verdict(folder, complete, manifest_bytes(folder), problems)


def set_aside(folder: Path, problems: tuple[str, ...]) -> None:
    """Take COMPLETE away, so that `--resume` does not see the checkpoint; the reasons stand in its place."""
    (folder / DAMAGED).write_text("\n".join(problems) + "\n")
    sync_files(folder, [DAMAGED])
    os.unlink(folder / COMPLETE)
    sync_files(folder, ["."])


def set_aside_damaged(complete: list[Path], report: Callable[[str], None]) -> None:
    """Set the newest of `complete`, a run's checkpoints, aside until it is a whole one. `report` takes a line each."""
    for folder in reversed(complete):
        (verdict,) = verify([folder])
        if not verdict.problems:
            return
        set_aside(folder, verdict.problems)
        more = f" and {len(verdict.problems) - 1} more" if len(verdict.problems) > 1 else ""
        report(f"{folder} is set aside as damaged: {verdict.problems[0]}{more} (see {folder / DAMAGED})")


def _problems(folder: Path, known: dict[Path, tuple[str, ...]], on_bytes: Callable[[int], None]) -> tuple[str, ...]:
    """Of a complete checkpoint; `known` are those that were looked at already."""
    folder = folder.resolve()
    if folder not in known:
        known[folder] = tuple(_find_problems(folder, known, on_bytes))
    return known[folder]


def _find_problems(folder: Path, known: dict[Path, tuple[str, ...]], on_bytes: Callable[[int], None]) -> Iterator[str]:
    def done(_path: str, file_sum: FileSum) -> None:
        on_bytes(file_sum.bytes)

    try:
        manifest = read_manifest(folder)
    except UsageError as error:
        yield str(error)
        return
    found = list(damages(folder, manifest.items(), done))
    yield from found
    if (folder / TABLES).is_dir() and not any(TABLES in problem for problem in found):
        try:
            base = TableReader(folder / TABLES).base_folder  # looks whether the base is there, and the same
        except UsageError as error:
            yield str(error)
            return
        if base is not None:
            yield from (f"its base: {problem}" for problem in _problems(base, known, on_bytes))


def _incomplete(folder: Path) -> str:
    if (folder / DAMAGED).is_file():
        return f"{folder} was set aside as damaged: {(folder / DAMAGED).read_text().splitlines()[0]}"
    return f"{folder} is not complete (no {COMPLETE}): its save was cut short"
