"""Where the files of a save go, and what makes them count: a checkpoint of the run folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch.distributed as dist

from engram_checkpoints.checkpoint_files import COMPLETE, FileSum, FileSums, complete
from engram_megatron.training.parallel import Ranks
from engram_megatron.training.together import Together, last_line


class SaveTarget(Protocol):
    """What `CheckpointWriter` is told of one save. It calls the methods on all ranks, in its thread."""

    @property
    def path(self) -> Path:
        """The folder that this rank writes to; the files of all ranks have different names in it."""
        ...

    @property
    def may_fail(self) -> bool:
        """Whether training goes on where this cannot be written."""
        ...

    @property
    def metric(self) -> str:
        """What the tags of its numbers begin with."""
        ...

    def __str__(self) -> str:
        """Where it is, for people."""
        ...

    def begin(self) -> None:
        """Make the folder, empty, on the ranks that are to. Raises `OSError`."""
        ...

    def complete(self, together: Together, group: dist.ProcessGroup, sums: FileSums) -> None:
        """Make it count, now that all ranks have written: `sums` are those of this rank. Collective."""
        ...

    def reason(self, error: BaseException) -> str:
        """What is said of a save that failed on this rank, in one line."""
        ...


@dataclass(frozen=True)
class RunCheckpoint:
    """A folder of the run's `checkpoints`. The first rank calls `clean_up` once it counts."""

    path: Path
    ranks: Ranks
    clean_up: Callable[[], None]
    may_fail: bool = False
    metric: str = "checkpoint"

    def __str__(self) -> str:
        return str(self.path)

    def begin(self) -> None:
        if self.ranks.is_first:
            make_empty(self.path)

    def complete(self, together: Together, group: dist.ProcessGroup, sums: FileSums) -> None:
        of_ranks = together(sums.flush)  # what COMPLETE vouches for must be on disk before it is
        together(lambda: self._mark(merged(of_ranks)))

    def _mark(self, sums: dict[str, FileSum]) -> None:
        if self.ranks.is_first:
            complete(self.path, sums)
            self.clean_up()

    def reason(self, error: BaseException) -> str:
        return (
            f"checkpoint {self.path} could not be written ({last_line(error)}); {free_space(self.path)}; make room and "
            "continue from the last complete one with --resume"
        )


def make_empty(path: Path) -> None:
    """A folder in the place of what a killed run left half-written."""
    if path.exists():
        (path / COMPLETE).unlink(missing_ok=True)
        shutil.rmtree(path)
    path.mkdir(parents=True)


def merged(of_ranks: list[dict[str, FileSum]]) -> dict[str, FileSum]:
    """The files of all of several ranks."""
    return {name: file_sum for files in of_ranks for name, file_sum in files.items()}


def free_space(path: Path) -> str:
    """That this rank sees where `path` is, or would be."""
    existing = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
    return f"{shutil.disk_usage(existing).free / 1024**3:.2f} GiB are free there"
