"""Snapshots of a run on the disks of its nodes: each node holds its own ranks' files, and a copy of its neighbour's.

    LOCAL_DIR/<run>/step_00000340-9f3a61c2/     a save; the second number is its start's: a step may be saved again
      node_003_of_064/                          the files that ranks of node 3 wrote, with manifest.json and COMPLETE
      node_002_of_064.copy/                     those of node 2, as this node received them

The parts of all nodes together are a checkpoint (docs/checkpoints.md), but for its manifest and mark.
"""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from engram_checkpoints.checkpoint_files import (
    READ_BYTES,
    FileSum,
    FileSums,
    SummedFile,
    difference,
    is_complete,
)

_SAVE = re.compile(r"step_(\d{8,})-[0-9a-f]{8}")
_PART = re.compile(r"node_(\d{3,})_of_(\d{3,})(\.copy)?")


class Part(NamedTuple):
    """The files of one node of a save, whole, in `path`."""

    save: str
    node: int
    num_nodes: int
    is_copy: bool
    path: Path


def save_name(step: int, number: int) -> str:
    """Of the save of `step` by the start of the run with `number`, 0 .. 2**32 - 1, drawn by chance."""
    return f"step_{step:08d}-{number:08x}"


def step_of(save: str) -> int:
    found = _SAVE.fullmatch(save)
    assert found is not None, save
    return int(found[1])


def part_path(folder: Path, save: str, node: int, num_nodes: int, *, is_copy: bool) -> Path:
    return folder / save / f"node_{node:03d}_of_{num_nodes:03d}{'.copy' if is_copy else ''}"


def complete_parts(folder: Path) -> list[Part]:
    """What stands in a run's folder on this node."""
    parts = []
    for path in sorted(folder.glob("step_*/node_*")):
        named = _PART.fullmatch(path.name)
        if named is not None and _SAVE.fullmatch(path.parent.name) and is_complete(path):
            parts.append(Part(path.parent.name, int(named[1]), int(named[2]), named[3] is not None, path))
    return parts


def remove_saves(folder: Path, *, keep: str | None) -> None:
    """Remove all saves but `keep`. Several nodes of one file system may do so at a time; what cannot be removed
    stays."""
    for path in folder.glob("step_*"):
        if path.name != keep:
            shutil.rmtree(path, ignore_errors=True)
    if keep is None:
        with contextlib.suppress(OSError):  # something is left in it, or another node was faster
            folder.rmdir()


def copy_files(part: Part, files: Iterable[tuple[str, FileSum]], sums: FileSums) -> Iterator[str]:
    """Copy `files` of a part into the folder of `sums`; one line for each that cannot be read, or is not what its
    manifest says.

    Raises `OSError` where they cannot be written.
    """
    for name, wanted in files:
        source, target = part.path / name, sums.folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with SummedFile(target, sums) as copy:
                for content in _contents(source):
                    copy.write(content)
        except _UnreadableError as error:
            yield str(error)
            continue
        problem = difference(source, sums.sums()[name], wanted)
        if problem is not None:
            yield problem


class _UnreadableError(Exception):
    pass


def _contents(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as stream:
            while content := stream.read(READ_BYTES):
                yield content
    except OSError as error:
        raise _UnreadableError(f"{path} cannot be read: {error.strerror}") from error
