"""What of a long job is on disk already, so that a second try goes on where the first one stopped.

A journal stands beside the folder that the job fills, one JSON line each:

    {"job": ...}                                     what is done; another job begins anew
    {"unit": name, "files": {path: [bytes, crc]}, "note": ...}   files that belong together, all of them on disk

A line is written after its files are on disk, so neither a kill nor a loss of power leaves a line without its files.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from engram_checkpoints.checkpoint_files import FileSum, FileSums, sync_files
from engram_megatron.errors import UsageError

_BATCH_BYTES, _BATCH_FILES = 256 * 1024**2, 1024  # what is brought to disk at a time, while the job goes on


class FileJournal(FileSums):
    """Sums of the files below `folder`, in units. `is_new`: nothing is left of an earlier try."""

    def __init__(self, folder: Path, journal: Path, job: dict[str, Any]) -> None:
        """Takes up what an earlier try of the same `job` has finished, and removes all else from `folder`.

        Raises `UsageError` where another process does the job right now.
        """
        super().__init__(folder)
        self._path = journal
        self._units: dict[str, Any] = {}
        self._unit_files: dict[str, FileSum] = {}
        self._batch: list[tuple[str, dict[str, FileSum], Any]] = []
        self._syncing: Future[None] | None = None
        self._thread = ThreadPoolExecutor(1)
        journal.parent.mkdir(parents=True, exist_ok=True)
        self._file = journal.open("a+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(f"{folder} is being written by another process; wait for it, or choose another") from error
        self.is_new = not self._take_up(job)
        if self.is_new:
            shutil.rmtree(folder, ignore_errors=True)
            self._file.truncate(0)
            self._append([{"job": job}])
        folder.mkdir(parents=True, exist_ok=True)
        self._remove_unfinished()

    @staticmethod
    def is_of(journal: Path, job: dict[str, Any]) -> bool:
        """Whether `journal` is there and one of `job`."""
        lines, _ = _whole_lines(journal)
        return bool(lines) and lines[0] == {"job": _as_json(job)}

    def is_done(self, unit: str) -> bool:
        return unit in self._units

    def notes(self, prefix: str) -> dict[str, Any]:
        return {unit: note for unit, note in self._units.items() if unit.startswith(prefix)}

    def add(self, path: Path, file_sum: FileSum) -> None:
        super().add(path, file_sum)
        self._unit_files[str(path.relative_to(self.folder))] = file_sum

    def commit(self, unit: str, note: Any = None) -> None:
        """Raises `OSError` for an earlier unit that the disk did not take."""
        self._batch.append((unit, self._unit_files, note))
        self._units[unit], self._unit_files = note, {}
        files = [file_sum for _, of_unit, _ in self._batch for file_sum in of_unit.values()]
        if sum(file_sum.bytes for file_sum in files) >= _BATCH_BYTES or len(files) >= _BATCH_FILES:
            self._sync_batch()

    def flush(self) -> dict[str, FileSum]:
        """As of `FileSums`; every unit is in the journal then."""
        self._sync_batch()
        self._wait()
        sums = self.sums()
        sync_files(self.folder, {str(parent) for path in sums for parent in Path(path).parents})
        sync_files(self.folder, self._unit_files)
        return sums

    def remove(self) -> None:
        """The job is done."""
        self._path.unlink()
        self._file.close()

    def _sync_batch(self) -> None:
        self._wait()
        batch, self._batch = self._batch, []
        self._syncing = self._thread.submit(self._write_down, batch)

    def _wait(self) -> None:
        if self._syncing is not None:
            self._syncing.result()

    def _write_down(self, batch: list[tuple[str, dict[str, FileSum], Any]]) -> None:
        sync_files(self.folder, [path for _, files, _ in batch for path in files])
        self._append([{"unit": unit, "files": files, "note": note} for unit, files, note in batch])

    def _append(self, lines: list[Any]) -> None:
        self._file.write("".join(json.dumps(line) + "\n" for line in lines))
        self._file.flush()
        os.fsync(self._file.fileno())

    def _take_up(self, job: dict[str, Any]) -> bool:
        lines, num_bytes = _whole_lines(self._path)
        if not self.is_of(self._path, job) or not self.folder.is_dir():
            return False
        for line in lines[1:]:
            self._units[line["unit"]] = line["note"]
            for path, file_sum in line["files"].items():
                super().add(self.folder / path, FileSum(*file_sum))
        self._file.truncate(num_bytes)
        return True

    def _remove_unfinished(self) -> None:
        finished = self.sums()
        for path in self.folder.rglob("*"):
            if path.is_file() and str(path.relative_to(self.folder)) not in finished:
                path.unlink()


def _whole_lines(journal: Path) -> tuple[list[Any], int]:
    """The lines of a journal, without one that was cut off, and their bytes."""
    lines, num_bytes = [], 0
    with contextlib.suppress(FileNotFoundError, ValueError):
        for text in journal.read_bytes().splitlines(keepends=True):
            if text.endswith(b"\n"):
                lines.append(json.loads(text))
                num_bytes += len(text)
    return lines, num_bytes


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))
