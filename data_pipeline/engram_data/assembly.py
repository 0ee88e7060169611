"""Shards of the corpus from pieces: where each piece's tokens come to lie, and the writing of one shard."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram_data.build_folder import BuildPaths
from engram_data.corpus_format import DOCUMENT_SIZES, INDEX_SIZES, ArraySizes, ShardRecord, token_dtype
from engram_data.errors import CorpusError
from engram_data.piece import PieceReader, PieceSummary, piece_path
from engram_data.shard_writer import ShardFile, shard_path


@dataclass(frozen=True)
class ArrayLayout:
    """One array of one split: its length in elements, element type and sizes."""

    split: str
    name: str
    length: int
    dtype: np.dtype[Any]
    sizes: ArraySizes


@dataclass(frozen=True)
class Place:
    """A piece, and the tokens and documents of its split that come before it."""

    summary: PieceSummary
    first_token: int
    first_document: int


@dataclass(frozen=True)
class ShardTask:
    """Shard number `shard` of an array, made of `places`, in the build of folder `root`."""

    root: Path
    array: ArrayLayout
    shard: int
    token_dtype: np.dtype[Any]
    token_chunk: int
    num_documents: int  # of the split
    places: list[Place]

    @property
    def bounds(self) -> tuple[int, int]:
        """First element of the shard, and the one behind its last."""
        start = self.shard * self.array.sizes.shard
        return start, min(start + self.array.sizes.shard, self.array.length)


def layouts_of(
    split: str, num_tokens: int, num_documents: int, vocab_size: int, sizes: ArraySizes
) -> list[ArrayLayout]:
    """The arrays of `split`."""
    int64 = np.dtype(np.int64)
    return [
        ArrayLayout(split, "tokens", num_tokens, token_dtype(vocab_size), sizes),
        ArrayLayout(split, "document_ends", num_documents, int64, DOCUMENT_SIZES),
        ArrayLayout(split, "chunk_first_document", sizes.num_chunks(num_tokens) + 1, int64, INDEX_SIZES),
    ]


def shard_tasks(
    root: Path, split: str, pieces: Sequence[PieceSummary], layouts: list[ArrayLayout]
) -> Iterator[ShardTask]:
    """One task for each shard of `layouts`, with the pieces that it is made of; `pieces`: all, in order."""
    num_tokens = np.array([piece.num_tokens[split] for piece in pieces], np.int64)
    num_documents = np.array([piece.num_documents[split] for piece in pieces], np.int64)
    first_tokens, first_documents = np.cumsum(num_tokens) - num_tokens, np.cumsum(num_documents) - num_documents
    tokens = layouts[0]
    for array in layouts:
        for shard in range(array.sizes.num_shards(array.length)):
            start, stop = shard * array.sizes.shard, (shard + 1) * array.sizes.shard
            if array.name == "chunk_first_document":  # of 4.4e12 tokens: in practice there is one
                chosen = np.flatnonzero(num_documents)
            else:
                firsts, counts = (first_tokens, num_tokens) if array is tokens else (first_documents, num_documents)
                chosen = np.flatnonzero((firsts < stop) & (firsts + counts > start))
            places = [Place(pieces[i], int(first_tokens[i]), int(first_documents[i])) for i in chosen.tolist()]
            total = int(num_documents.sum())
            yield ShardTask(root, array, shard, tokens.dtype, tokens.sizes.chunk, total, places)


def record_path(paths: BuildPaths, array: ArrayLayout, shard: int) -> Path:
    """Where the record of a shard that is written lies."""
    return paths.records / f"{array.split}.{array.name}.{shard}.json"


def read_record(paths: BuildPaths, array: ArrayLayout, shard: int) -> ShardRecord | None:
    """None where the shard has not been written."""
    path = record_path(paths, array, shard)
    return ShardRecord(**json.loads(path.read_bytes())) if path.exists() else None


def write_shard(task: ShardTask) -> ShardRecord:
    """Write one shard file and then its record. Raises `CorpusError` where the disk does not take them."""
    paths = BuildPaths(task.root)
    array = task.array
    temporary = paths.temporary_file(f"{array.split}.{array.name}.{task.shard}")
    try:
        shard = ShardFile(temporary, array.dtype, array.sizes)
        try:
            for values in _ELEMENTS[array.name](task):
                shard.append(values)
            start, stop = task.bounds
            assert array.sizes.shard - shard.room == stop - start, (task.shard, shard.room, start, stop)
            record = shard.close()
            path = shard_path(paths.corpus / array.split, array.name, task.shard)
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.rename(path)
        finally:
            shard.abandon()
            with suppress(OSError):
                temporary.unlink()
        paths.write(record_path(paths, array, task.shard), json.dumps(asdict(record)).encode())
        return record
    except OSError as error:
        raise CorpusError(f"cannot write {task.root}: {error.strerror or error}") from None


def _reader(task: ShardTask, place: Place) -> PieceReader:
    return PieceReader(piece_path(BuildPaths(task.root).pieces, place.summary.unit), place.summary, task.token_dtype)


def _tokens(task: ShardTask) -> Iterator[NDArray[Any]]:
    start, stop = task.bounds
    for place in task.places:
        first = place.first_token
        yield from _reader(task, place).tokens(task.array.split, start - first, stop - first)


def _ends(task: ShardTask, place: Place) -> NDArray[np.int64]:
    return place.first_token + np.cumsum(_reader(task, place).lengths(task.array.split))


def _document_ends(task: ShardTask) -> Iterator[NDArray[Any]]:
    start, stop = task.bounds
    for place in task.places:
        first = place.first_document
        yield _ends(task, place)[max(start - first, 0) : max(stop - first, 0)]


def _chunk_first_documents(task: ShardTask) -> Iterator[NDArray[Any]]:
    """How many documents end at or before the start of each chunk, and behind the last chunk how many there are."""
    start, stop = task.bounds
    chunk = task.token_chunk
    next_chunk = 0
    for place in task.places:
        ends = _ends(task, place)
        behind = int(ends[-1] - 1) // chunk + 1  # the first chunk that starts at or behind the last end
        chunks = np.arange(next_chunk, behind, dtype=np.int64)
        next_chunk = behind
        counts = place.first_document + np.searchsorted(ends, chunks * chunk, side="right")
        yield counts[(chunks >= start) & (chunks < stop)]
    if stop == task.array.length:
        yield np.array([task.num_documents], np.int64)


_ELEMENTS: dict[str, Callable[[ShardTask], Iterator[NDArray[Any]]]] = {
    "tokens": _tokens,
    "document_ends": _document_ends,
    "chunk_first_document": _chunk_first_documents,
}
