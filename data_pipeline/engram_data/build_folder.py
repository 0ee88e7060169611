"""OUT.partial, the folder of a build that is not finished, and where a build that was stopped goes on.

lock          held by the build that runs
build.json    the plan that the build was begun with
pieces/       one file per unit that is tokenised (see `piece`)
records/      bytes and sha256 of each shard that is written
temporary/    what is being written
corpus/       the corpus, shard by shard; it becomes OUT when it is complete
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from engram_data.build_plan import BuildPlan
from engram_data.corpus_format import TOKENIZER_FILE, partial_path
from engram_data.errors import CorpusError
from engram_data.tokenizer import CorpusTokenizer


class BuildPaths:
    """Where what is, in the folder `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.lock, self.plan = root / "lock", root / "build.json"
        self.pieces, self.records, self.temporary = root / "pieces", root / "records", root / "temporary"
        self.corpus = root / "corpus"
        self.tokenizer = self.corpus / TOKENIZER_FILE

    def temporary_file(self, name: str) -> Path:
        """A name that no other process uses."""
        return self.temporary / f"{socket.gethostname()}.{os.getpid()}.{name}"

    def write(self, path: Path, content: bytes) -> None:
        """Write the small file `path` whole or not at all."""
        temporary = self.temporary_file(path.name)
        with temporary.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.rename(path)


class BuildFolder:
    """`with BuildFolder(out, plan, tokenizer) as folder: ...; folder.finish()`. One process per build holds it.

    Begins OUT.partial, or goes on in it. Left without `finish`, it stays where it holds a piece. Raises `CorpusError`
    where OUT exists, another build runs, or OUT.partial was begun with another plan; an OSError inside becomes one.
    """

    def __init__(self, out: Path, plan: BuildPlan, tokenizer: CorpusTokenizer) -> None:
        self._out, self._plan, self._tokenizer = out, plan, tokenizer
        self.paths = BuildPaths(partial_path(out))

    def __enter__(self) -> Self:
        paths = self.paths
        if self._out.exists():
            raise CorpusError(f"{self._out} exists: choose another folder, or remove it first")
        self._new_parents = [parent for parent in paths.root.parents if not parent.exists()]
        try:
            paths.root.mkdir(parents=True, exist_ok=True)
            self._lock = paths.lock.open("ab")
        except OSError as error:
            raise CorpusError(f"cannot write {paths.root}: {error.strerror}") from None
        try:
            self._take_lock()
            self._begin_or_go_on()
        except OSError as error:
            self._remove_without_piece()
            self._lock.close()
            raise CorpusError(f"cannot write {paths.root}: {error.strerror}") from None
        except BaseException:
            self._lock.close()
            raise
        return self

    def _take_lock(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CorpusError(f"{self.paths.root} exists: another build is writing it") from None
        except OSError:
            pass  # a file system without locks: two builds at once do the same work twice, and write the same

    def _begin_or_go_on(self) -> None:
        paths = self.paths
        if paths.plan.exists():
            difference = self._plan.difference(json.loads(paths.plan.read_bytes()))
            if difference is not None:
                raise CorpusError(
                    f"{paths.root} was begun with other sources or options ({difference}): remove it to start again"
                )
        elif {path.name for path in paths.root.iterdir()} - {paths.lock.name, paths.temporary.name}:
            raise CorpusError(f"{paths.root} exists and is no build that could go on: remove it")
        shutil.rmtree(paths.temporary, ignore_errors=True)
        paths.temporary.mkdir(exist_ok=True)
        paths.write(paths.plan, json.dumps(self._plan.to_json()).encode())
        for folder in (paths.pieces, paths.records, paths.corpus):
            folder.mkdir(exist_ok=True)
        paths.write(paths.tokenizer, self._tokenizer.json_bytes)

    def finish(self) -> None:
        """Give the corpus its name and remove the rest."""
        for file in self.paths.corpus.glob("**/*"):
            if file.suffix in (".json", ".jsonl") or file.is_dir():  # shards are on the disk already
                _synchronise(file)
        self.paths.corpus.rename(self._out)
        _synchronise(self._out.parent)
        self._remove()

    def _remove(self) -> None:
        shutil.rmtree(self.paths.root, ignore_errors=True)

    def remove(self) -> None:
        """Remove the folder, and those above it that were made for it."""
        self._remove()
        for parent in self._new_parents:
            with suppress(OSError):
                parent.rmdir()

    def _remove_without_piece(self) -> None:
        """There is nothing to go on with."""
        if self.paths.root.exists() and not any(self.paths.pieces.glob("*")):
            self.remove()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        paths = self.paths
        self._remove_without_piece()
        self._lock.close()
        kept = paths.root.exists()
        hint = f"; {paths.root} is kept: the same command goes on, or remove it" if kept else ""
        if isinstance(error, OSError):
            raise CorpusError(f"cannot write {paths.root}: {error.strerror or error}{hint}") from None
        if isinstance(error, CorpusError) and hint:
            raise CorpusError(f"{error}{hint}") from None


def _synchronise(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
