"""The files of a checkpoint folder: what each holds, whether it is whole, and when the folder counts.

    manifest.json    {"files": {path below the folder: [bytes, CRC-32C]}}, every file but the two named here
    COMPLETE         {"manifest_crc32c": ...}, written last; a folder without it does not exist for a resume

Sums are taken of the bytes as they are written, not read back, so what the disk did to them shows.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import google_crc32c
import numpy as np
from zarr.core.buffer import Buffer
from zarr.storage import LocalStore

from engram_megatron.errors import UsageError

COMPLETE, MANIFEST = "COMPLETE", "manifest.json"
READ_BYTES = 8 * 1024**2
_SYNC_THREADS = 8  # a file system syncs many small files beside each other


class FileSum(NamedTuple):
    """Of one file."""

    bytes: int
    crc32c: int


class FileSums:
    """Of the files that this process has written below a checkpoint's `folder`. Threads may share it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._sums: dict[str, FileSum] = {}
        self._lock = threading.Lock()

    def add(self, path: Path, file_sum: FileSum) -> None:
        with self._lock:
            self._sums[str(path.relative_to(self.folder))] = file_sum

    def add_written(self, path: Path) -> None:
        """A small file that somebody else's code has just written."""
        self.add(path, sum_of(path))

    def rename(self, path: Path, new_path: Path) -> None:
        with self._lock:
            self._sums[str(new_path.relative_to(self.folder))] = self._sums.pop(str(path.relative_to(self.folder)))

    def write_json(self, path: Path, value: Any) -> None:
        content = (json.dumps(value, indent=2) + "\n").encode()
        path.write_bytes(content)
        self.add(path, FileSum(len(content), google_crc32c.value(content)))

    def commit(self, unit: str, note: Any = None) -> None:
        """The files added since the last call make up `unit`; `note`, plain values, is kept with it."""

    def is_done(self, unit: str) -> bool:
        """Whether an earlier try has committed `unit`: see `FileJournal`, here nothing is left of one."""
        return False

    def notes(self, prefix: str) -> dict[str, Any]:
        """The notes of the units of an earlier try whose names begin with `prefix`."""
        return {}

    def flush(self) -> dict[str, FileSum]:
        """Wait until all files, and the folders that name them, are on disk. Returns the sums by path.

        Raises `OSError` where the disk did not take them.
        """
        sums = self.sums()
        sync_files(self.folder, [*sums, *{str(parent) for path in sums for parent in Path(path).parents}])
        return sums

    def sums(self) -> dict[str, FileSum]:
        """Of all files so far, by path."""
        with self._lock:
            return dict(self._sums)


class SummedStore(LocalStore):
    """A zarr store in `root`, below the folder of `sums`, that adds what it writes to them."""

    def __init__(self, root: Path, sums: FileSums) -> None:
        super().__init__(root)
        self.sums = sums

    def with_read_only(self, read_only: bool = False) -> SummedStore:
        assert not read_only, "a store to write to"
        return SummedStore(self.root, self.sums)

    async def set(self, key: str, value: Buffer) -> None:
        await super().set(key, value)
        self._add(key, value)

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        with contextlib.suppress(FileExistsError):
            await self._set(key, value, exclusive=True)
            self._add(key, value)

    def set_sync(self, key: str, value: Buffer) -> None:
        super().set_sync(key, value)
        self._add(key, value)

    def _add(self, key: str, value: Buffer) -> None:
        content = value.as_numpy_array()
        self.sums.add(self.root / key, FileSum(content.nbytes, google_crc32c.value(content)))


class SummedFile(io.FileIO):
    """A new file that adds itself to `sums` when it is closed. Written from beginning to end."""

    def __init__(self, path: Path, sums: FileSums) -> None:
        super().__init__(path, "wb")
        self._path, self._sums = path, sums
        self._sum = FileSum(0, 0)

    def write(self, data: Any) -> int:
        content = np.frombuffer(data, np.uint8) if len(data) else np.empty(0, np.uint8)
        written = 0
        while written < content.size:  # a raw file may take a part only
            written += super().write(content[written:].data)
        self._sum = FileSum(self._sum.bytes + written, google_crc32c.extend(self._sum.crc32c, content))
        return written

    def close(self) -> None:
        if not self.closed:
            self._sums.add(self._path, self._sum)
        super().close()


def complete(folder: Path, sums: dict[str, FileSum]) -> None:
    """Make `folder` count, whose files of all ranks, on disk, are `sums`. One process calls it."""
    own = FileSums(folder)
    own.write_json(folder / MANIFEST, {"files": {path: list(sums[path]) for path in sorted(sums)}})
    manifest = own.flush()[MANIFEST]
    partial = folder / f"{COMPLETE}.partial"
    partial.write_text(json.dumps({"manifest_crc32c": manifest.crc32c}) + "\n")
    _sync(partial)
    partial.replace(folder / COMPLETE)
    _sync(folder)
    _sync(folder.parent)


def is_complete(folder: Path) -> bool:
    return (folder / COMPLETE).is_file()


def read_manifest(folder: Path) -> dict[str, FileSum]:
    """What the files of a complete checkpoint should be, by path.

    Raises `UsageError` where the folder is no complete checkpoint, or its manifest is damaged.
    """
    if not is_complete(folder):
        raise UsageError(f"{folder} is not a complete checkpoint (no {COMPLETE} in it)")
    try:
        content = (folder / MANIFEST).read_bytes()
        wanted = json.loads((folder / COMPLETE).read_text())["manifest_crc32c"]
        if google_crc32c.value(content) != wanted:
            raise ValueError("its CRC-32C is not that of COMPLETE")
        return {path: FileSum(*file_sum) for path, file_sum in json.loads(content)["files"].items()}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UsageError(f"{folder / MANIFEST} is damaged ({error}); use another checkpoint") from error


def damages(
    folder: Path, files: Iterable[tuple[str, FileSum]], on_file: Callable[[str, FileSum], None] | None = None
) -> Iterator[str]:
    """One line for each of `files` that is missing or is not what the manifest says; `on_file` is called after each."""
    for path, wanted in files:
        try:
            found = sum_of(folder / path)
        except FileNotFoundError:
            yield f"{folder / path} is missing"
        except OSError as error:
            yield f"{folder / path} cannot be read: {error.strerror}"
        else:
            problem = difference(folder / path, found, wanted)
            if problem is not None:
                yield problem
        if on_file is not None:
            on_file(path, wanted)


def difference(path: Path, found: FileSum, wanted: FileSum) -> str | None:
    """What is wrong with a file that should be `wanted`, in one line."""
    if found.bytes != wanted.bytes:
        return f"{path} has {found.bytes} bytes, not the {wanted.bytes} that were written"
    if found != wanted:
        return f"{path} is damaged: its CRC-32C is {found.crc32c:08x}, not {wanted.crc32c:08x}"
    return None


def sum_of(path: Path) -> FileSum:
    """Of the file as it stands on disk."""
    size, crc = 0, 0
    with path.open("rb") as file:
        while content := file.read(READ_BYTES):
            size, crc = size + len(content), google_crc32c.extend(crc, content)
    return FileSum(size, crc)


def sync_files(folder: Path, paths: Iterable[str]) -> None:
    """Wait until `paths`, files and folders below `folder`, are on disk."""
    with ThreadPoolExecutor(_SYNC_THREADS) as pool:
        for _ in pool.map(lambda path: _sync(folder / path), paths):
            pass


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
