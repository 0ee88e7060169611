"""Files of a checkpoint that are compared with its manifest before they are used."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from engram_checkpoints.checkpoint_files import FileSum, damages
from engram_megatron.errors import UsageError


class VerifiedFiles:
    """Below `folder`; `sums` as of `read_manifest`, None where other programs wrote the files, which have no sums."""

    def __init__(self, folder: Path, sums: Mapping[str, FileSum] | None) -> None:
        self.folder, self._sums = folder, sums
        self._checked: set[Path] = set()

    def check(self, path: Path) -> Path:
        """`path` itself, read through when it is first asked for. Raises `UsageError` where it is missing or is not
        what was written."""
        if self._sums is not None and path not in self._checked:
            name = str(path.relative_to(self.folder))
            if name not in self._sums:
                raise UsageError(f"{path} is not in the manifest of {self.folder}; use another checkpoint")
            for damage in damages(self.folder, [(name, self._sums[name])]):
                raise UsageError(f"{damage}; use another checkpoint")
            self._checked.add(path)
        return path
