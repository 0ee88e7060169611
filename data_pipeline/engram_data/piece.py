"""A piece: the tokens of one unit, on disk until the shards are made of them.

    tokens        of the corpus's type [sum of lengths], all documents one after another, each with its eos
    lengths       int64 [documents], behind padding to a multiple of 8 bytes
    splits        uint8 [documents], index in `SPLITS`
    rejections    JSON lines as in rejected.jsonl, but a line's number counts from the start of its span
    summary       JSON of `PieceSummary`
    trailer       uint64 bytes of the summary, then 8 bytes `TRAILER`

A piece gets its name when all of it is on the disk.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram_data.corpus_format import SPLITS
from engram_data.text_source import Rejection

TRAILER = b"egpiece1"
_REJECTIONS_IN_MEMORY = 2**20  # bytes


@dataclass(frozen=True)
class PieceSummary:
    """Counts of one unit, and what it was made from. `num_tokens`, `num_documents`: per split, eos included."""

    plan_sha256: str
    unit: int
    num_tokens: dict[str, int]
    num_documents: dict[str, int]
    sources: dict[str, dict[str, int]]  # documents and text_bytes per source name
    num_rejected: int
    rejected_bytes: int
    lines_of_last_span: int

    @property
    def total_tokens(self) -> int:
        """Of all splits."""
        return sum(self.num_tokens.values())

    @property
    def total_documents(self) -> int:
        """Of all splits."""
        return sum(self.num_documents.values())


def piece_path(pieces: Path, unit: int) -> Path:
    """The piece of unit number `unit` in the folder `pieces`."""
    return pieces / f"{unit:08}"


class PieceWriter:
    """Writes a piece to `temporary`, a file that does not exist."""

    def __init__(self, temporary: Path, dtype: np.dtype[Any]) -> None:
        self._dtype = dtype.newbyteorder("<")
        self._temporary = temporary
        self._file = temporary.open("xb")
        self._rejections = tempfile.SpooledTemporaryFile(_REJECTIONS_IN_MEMORY, dir=str(temporary.parent))  # noqa: SIM115
        self._lengths: list[NDArray[np.int64]] = []
        self._splits: list[NDArray[np.uint8]] = []
        self._num_tokens = 0
        self._num_rejected = 0
        self._sources: dict[str, Counter[str]] = {}

    def add(self, documents: list[NDArray[np.int64]], splits: list[str]) -> None:
        """Append documents, eos included. Raises OSError where the disk does not take them."""
        for ids in documents:
            self._file.write(ids.astype(self._dtype).tobytes())
        self._lengths.append(np.array([len(ids) for ids in documents], np.int64))
        self._splits.append(np.array([SPLITS.index(split) for split in splits], np.uint8))
        self._num_tokens += int(self._lengths[-1].sum())

    def count(self, source: str, text_bytes: int) -> None:
        """Count a document of `source`."""
        self._sources.setdefault(source, Counter()).update(documents=1, text_bytes=text_bytes)

    def reject(self, rejection: Rejection) -> None:
        """Note what was left out."""
        self._num_rejected += 1
        self._rejections.write((json.dumps(asdict(rejection)) + "\n").encode("utf-8"))

    def close(self, path: Path, plan_sha256: str, unit: int, lines_of_last_span: int) -> PieceSummary:
        """Complete the piece and give it the name `path`."""
        lengths = np.concatenate([np.zeros(0, np.int64), *self._lengths])
        splits = np.concatenate([np.zeros(0, np.uint8), *self._splits])
        summary = PieceSummary(
            plan_sha256,
            unit,
            {name: int(lengths[splits == index].sum()) for index, name in enumerate(SPLITS)},
            {name: int((splits == index).sum()) for index, name in enumerate(SPLITS)},
            {name: dict(counts) for name, counts in self._sources.items()},
            self._num_rejected,
            self._rejections.tell(),
            lines_of_last_span,
        )
        self._file.write(bytes(-self._file.tell() % 8))
        self._file.write(lengths.astype("<i8").tobytes())
        self._file.write(splits.tobytes())
        self._rejections.seek(0)
        while block := self._rejections.read(_REJECTIONS_IN_MEMORY):
            self._file.write(block)
        encoded = json.dumps(asdict(summary)).encode()
        self._file.write(encoded + len(encoded).to_bytes(8, "little") + TRAILER)
        self._file.flush()
        os.fsync(self._file.fileno())
        self.abandon()
        self._temporary.rename(path)
        return summary

    def abandon(self) -> None:
        """Close the files."""
        for file in (self._file, self._rejections):
            with suppress(OSError):  # closing writes what is buffered, and fails again on a full disk
                file.close()


def read_summary(path: Path) -> PieceSummary | None:
    """The summary of the piece `path`; None where there is no whole piece."""
    try:
        with path.open("rb") as stream:
            stream.seek(-16, os.SEEK_END)
            trailer = stream.read(16)
            if trailer[8:] != TRAILER:
                return None
            num_bytes = int.from_bytes(trailer[:8], "little")
            stream.seek(-16 - num_bytes, os.SEEK_END)
            return PieceSummary(**json.loads(stream.read(num_bytes)))
    except (OSError, ValueError, TypeError):
        return None


class PieceReader:
    """The parts of a piece, mapped: nothing is read before it is used."""

    def __init__(self, path: Path, summary: PieceSummary, dtype: np.dtype[Any]) -> None:
        num_tokens, num_documents = summary.total_tokens, summary.total_documents
        dtype = dtype.newbyteorder("<")
        lengths_at = -(-num_tokens * dtype.itemsize // 8) * 8
        splits_at = lengths_at + 8 * num_documents
        self._path = path
        self._rejected_at, self._rejected_bytes = splits_at + num_documents, summary.rejected_bytes
        self._tokens = _mapped(path, dtype, 0, num_tokens)
        self._lengths = _mapped(path, np.dtype("<i8"), lengths_at, num_documents)
        self._splits = _mapped(path, np.dtype("u1"), splits_at, num_documents)

    def lengths(self, split: str) -> NDArray[np.int64]:
        """Of the documents of `split`, int64 [documents]."""
        return np.asarray(self._lengths[self._splits == SPLITS.index(split)])

    def tokens(self, split: str, start: int, stop: int) -> Iterator[NDArray[Any]]:
        """Tokens `start` to `stop` of those of `split`, a run of neighbouring documents at a time."""
        documents = np.flatnonzero(self._splits == SPLITS.index(split))
        ends = np.cumsum(self._lengths)[documents]  # in the piece
        lengths = self._lengths[documents]
        split_ends = np.cumsum(lengths)
        chosen = (split_ends > start) & (split_ends - lengths < stop)
        documents, ends, lengths, split_ends = (a[chosen] for a in (documents, ends, lengths, split_ends))
        firsts = np.flatnonzero(np.diff(documents, prepend=-2) != 1)
        lasts = np.append(firsts[1:], len(documents)) - 1
        for first, last in zip(firsts, lasts, strict=False):
            shift = ends[first] - split_ends[first]  # from a place in the split to the place in the piece
            begin = max(split_ends[first] - lengths[first], start)
            yield self._tokens[begin + shift : min(split_ends[last], stop) + shift]

    def rejections(self) -> Iterator[dict[str, Any]]:
        """The rejections, with the numbers of lines as they are in the piece."""
        with self._path.open("rb") as stream:
            stream.seek(self._rejected_at)
            end = self._rejected_at + self._rejected_bytes
            while stream.tell() < end:
                yield json.loads(stream.readline())


def _mapped(path: Path, dtype: np.dtype[Any], offset: int, length: int) -> NDArray[Any]:
    if not length:
        return np.zeros(0, dtype)  # an empty map is refused
    return np.memmap(path, dtype, mode="r", offset=offset, shape=(length,))
