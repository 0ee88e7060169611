"""Documents from files: `.jsonl` (a document per line) and `.txt` (a document per file), plain, `.xz` or `.gz`."""

from __future__ import annotations

import gzip
import json
import lzma
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from engram_data.errors import CorpusError

KINDS = (".jsonl", ".txt")
COMPRESSIONS = (".xz", ".gz")


@dataclass(frozen=True)
class SourceFile:
    """A text file, and the source (a file or folder, as the user named it) that it belongs to."""

    path: Path
    source: str

    @property
    def kind(self) -> str:
        """Its suffix without that of a compression."""
        return _kind(self.path)

    @property
    def can_be_cut(self) -> bool:
        """Whether its lines can be read from the middle."""
        return self.path.suffix == ".jsonl"


@dataclass(frozen=True)
class Span:
    """The lines of `file` that start in its bytes `start` to `stop`; None: to its end."""

    file: SourceFile
    start: int = 0
    stop: int | None = None


@dataclass(frozen=True)
class Document:
    """One document; `source` as in `SourceFile`."""

    text: str
    source: str


@dataclass(frozen=True)
class Rejection:
    """A line (1-based) that is no document, and why; `id` where the line tells one."""

    file: str
    line: int
    reason: str
    id: str | None = None


def _kind(path: Path) -> str:
    return Path(path.stem).suffix if path.suffix in COMPRESSIONS else path.suffix


def find_text_files(sources: Sequence[str]) -> list[SourceFile]:
    """The files of `sources` in order; a folder gives all its text files, recursively, sorted by path.

    Raises `CorpusError` for a source that is missing, of another kind, without text files, or given twice.
    """
    files: list[SourceFile] = []
    for source in sources:
        path = Path(source)
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if _kind(p) in KINDS and p.is_file())
            if not found:
                raise CorpusError(f"no text in {source}: there is no .jsonl or .txt (plain, .xz or .gz) in this folder")
        elif not path.exists():
            raise CorpusError(f"no such file or folder: {source}")
        elif _kind(path) in KINDS:
            found = [path]
        else:
            raise CorpusError(f"{source} is neither .jsonl nor .txt (plain, .xz or .gz): convert or rename it")
        files += [SourceFile(p, source) for p in found]
    seen: set[Path] = set()
    for file in files:
        resolved = file.path.resolve()
        if resolved in seen:
            raise CorpusError(f"{file.path} is given twice: its text would be counted twice")
        seen.add(resolved)
    return files


def read_documents(files: Sequence[SourceFile], reject: Callable[[Rejection], None]) -> Iterator[Document]:
    """Documents of `files` in order; what is none goes to `reject`. Blank lines are skipped.

    Raises `CorpusError` for a file that cannot be read or whose compression is damaged.
    """
    for file in files:
        for candidate in SpanReader(Span(file)):
            if isinstance(candidate, Rejection):
                reject(candidate)
            else:
                yield candidate


class SpanReader:
    """Iterates over the documents of a span and what is none; lines are numbered from the span's first one.

    Raises `CorpusError` for a file that cannot be read or whose compression is damaged.
    """

    def __init__(self, span: Span) -> None:
        assert span.file.can_be_cut or (span.start, span.stop) == (0, None), span
        self._span = span
        self.num_lines = 0  # read so far

    def __iter__(self) -> Iterator[Document | Rejection]:
        file = self._span.file
        if file.kind != ".jsonl":
            yield from _whole_file(file)
            return
        for line in _read_lines(self._span):
            self.num_lines += 1
            if line.strip():
                yield _parse_json_line(file, self.num_lines, line)


def _open(path: Path) -> BinaryIO:
    if path.suffix == ".xz":
        return cast(BinaryIO, lzma.open(path, "rb"))
    if path.suffix == ".gz":
        return cast(BinaryIO, gzip.open(path, "rb"))
    return path.open("rb")


def _read_lines(span: Span) -> Iterator[bytes]:
    """Lines of the decompressed file."""
    path = span.file.path
    try:
        with _open(path) as stream:
            if span.stop is None:
                yield from stream
            else:
                yield from _lines_that_start_in(stream, span.start, span.stop)
    except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile) as error:
        raise CorpusError(f"{path} is damaged, it cannot be decompressed: {error}") from None
    except OSError as error:
        raise CorpusError(f"cannot read {path}: {error.strerror or error}") from None


def _lines_that_start_in(stream: BinaryIO, start: int, stop: int) -> Iterator[bytes]:
    if start:
        stream.seek(start - 1)
        start += len(stream.readline()) - 1  # what is left of a line that starts before; of none the newline
    while start < stop:
        line = stream.readline()
        if not line:
            return
        yield line
        start += len(line)


def _parse_json_line(file: SourceFile, number: int, line: bytes) -> Document | Rejection:
    def rejected(reason: str, identity: object = None) -> Rejection:
        return Rejection(str(file.path), number, reason, None if identity is None else str(identity))

    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return rejected(f"invalid UTF-8 at byte {error.start} of the line")
    except (ValueError, RecursionError) as error:
        return rejected(f"invalid JSON: {error}")
    if not isinstance(record, dict):
        return rejected(f"not an object but a {type(record).__name__}")
    text, identity = record.get("text"), record.get("id")
    if not isinstance(text, str):
        return rejected("no field `text`, or it is not a string", identity)
    if not text:
        return rejected("field `text` is empty", identity)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return rejected(f"field `text` holds half a surrogate pair at character {error.start}", identity)
    return Document(text, file.source)


def _whole_file(file: SourceFile) -> Iterator[Document | Rejection]:
    content = b"".join(_read_lines(Span(file)))
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        yield Rejection(str(file.path), number, f"invalid UTF-8 at byte {error.start} of the file")
        return
    if text:
        yield Document(text, file.source)
    else:
        yield Rejection(str(file.path), 1, "the file is empty")
