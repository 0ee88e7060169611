"""A folder that stands at its place only when all of it is on disk."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from engram_checkpoints.checkpoint_files import FileSums, complete, sync_files
from engram_checkpoints.file_journal import FileJournal
from engram_megatron.errors import UsageError


class TargetFolder:
    """Filled as `TARGET.partial`, renamed to `target` by `finish`. `folder`: where files go; `sums` takes theirs.

    With a `job`, plain values that say what is written, `TARGET.journal` says what of it is there, and another
    `TargetFolder` of the same job goes on after a kill.
    """

    def __init__(self, target: Path, job: dict[str, Any] | None = None, inside: str = ".") -> None:
        """`inside`: the folder below `target` that files go to. Raises `UsageError` where something stands at `target`;
        what a try of another job left half-written is removed."""
        check_is_new(target)
        self.target = target
        self.partial = target.with_name(target.name + ".partial")
        self.folder = self.partial / inside
        self._journal: FileJournal | None = None
        try:
            if job is None:
                shutil.rmtree(self.partial, ignore_errors=True)
                self.folder.mkdir(parents=True)
                self.sums = FileSums(self.folder)
            else:
                self.sums = self._journal = FileJournal(self.folder, _journal_of(target), job)
        except OSError as error:
            raise UsageError(f"{target} cannot be made: {error.strerror}; choose another target") from error

    @staticmethod
    def is_finished(target: Path, job: dict[str, Any]) -> bool:
        """Whether `target` is what `job` makes, by a try that was killed before it could say so."""
        return target.exists() and FileJournal.is_of(_journal_of(target), job)

    @staticmethod
    def forget(target: Path) -> None:
        """Remove the journal of a finished target."""
        _journal_of(target).unlink(missing_ok=True)

    def finish(self, beside: dict[str, str] | None = None) -> None:
        """Make the folder a complete one; `beside`: small text files by name, that stand in `target` itself."""
        complete(self.folder, self.sums.flush())
        for name, text in (beside or {}).items():
            (self.partial / name).write_text(text)
        sync_files(self.partial, [*(beside or {}), "."])
        self.partial.rename(self.target)
        sync_files(self.target.parent, ["."])
        if self._journal is not None:
            self._journal.remove()


def _journal_of(target: Path) -> Path:
    return target.with_name(target.name + ".journal")


def check_is_new(target: Path) -> None:
    """Raise `UsageError` where something stands at `target`."""
    if target.exists():
        raise UsageError(f"{target} exists already; choose another target, or remove it first")
