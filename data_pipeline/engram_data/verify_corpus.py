"""Whether a corpus is whole: reads every byte of it, and names all that is damaged. Memory: a block of ends."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from engram_data.corpus import Corpus, read_summary
from engram_data.corpus_format import ARRAYS, SPLITS, TOKENIZER_FILE, ShardRecord, TokenizerIdentity
from engram_data.errors import CorpusError

ENDS_PER_BLOCK = 2**22

Report = Callable[[int], None]


@dataclass(frozen=True, eq=False)
class _Split:
    """The arrays of one split, and what they say of their files."""

    path: Path
    arrays: dict[str, Any]
    shards: dict[str, list[ShardRecord]]
    tokenizer: TokenizerIdentity

    @classmethod
    def open(cls, path: Path) -> _Split:
        """May raise anything: damaged JSON does in zarr."""
        group = zarr.open_group(path, mode="r")
        arrays = {name: group[name] for name in ARRAYS}
        shards = {name: [ShardRecord(**s) for s in array.attrs["shards"]] for name, array in arrays.items()}
        return cls(path, arrays, shards, TokenizerIdentity(**dict(group.attrs)["tokenizer"]))


def shard_bytes(root: Path) -> int:
    """Bytes of the files that `verify_corpus` reads, as they are now."""
    return sum(file.stat().st_size for split in SPLITS for file in (root / split).glob("*/c/*"))


def verify_corpus(root: Path, report: Report) -> list[str]:
    """What is wrong with the corpus, one line for each file or rule; empty where nothing is.

    Checked: metadata, fingerprints and the tokenizer; size and sha256 of every shard, the crc32c of every chunk in it;
    ids below the vocabulary; document ends that rise up to the last token; the chunk index, which must count them.
    `report` is called with the bytes of each file that was read. Raises `CorpusError` where there is no corpus.
    """
    read_summary(root)
    problems: dict[str, None] = {}  # in order, each once: both splits may tell of the tokenizer
    for name in SPLITS:
        problems |= dict.fromkeys(_verify_split(root, name, report))
    return list(problems)


def _verify_split(root: Path, name: str, report: Report) -> Iterator[str]:
    try:
        split = _Split.open(root / name)
    except Exception as error:
        yield _why_not(root, name) or f"{root / name} cannot be opened: {' '.join(str(error).split())}"
        return
    problems = [
        problem
        for array in ARRAYS
        for number in range(len(split.shards[array]))
        for problem in _verify_shard(split, array, number, report)
    ]
    problems += _verify_tokenizer(root / TOKENIZER_FILE, split.tokenizer)
    if not problems:
        damage = _why_not(root, name)  # all that is left: metadata, fingerprint
        problems += [damage] if damage else _verify_index(split)
    yield from problems


def _why_not(root: Path, name: str) -> str | None:
    try:
        Corpus.open(root, name, cached_chunks=1)
    except CorpusError as error:
        return str(error)
    return None


def _verify_tokenizer(file: Path, identity: TokenizerIdentity) -> Iterator[str]:
    try:
        sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError as error:
        yield f"cannot read {file}: {error.strerror}"
        return
    if sha256 != identity.sha256:
        hashes = f"{sha256[:16]}..., not {identity.sha256[:16]}..."
        yield f"{file} is not the tokenizer that made the tokens: sha256 {hashes}"


def _verify_shard(split: _Split, name: str, number: int, report: Report) -> Iterator[str]:
    array, record = split.arrays[name], split.shards[name][number]
    file = split.path / name / "c" / str(number)
    try:
        size = file.stat().st_size
    except OSError as error:
        yield f"{file}: {error.strerror}"
        return
    report(size)
    if size != record.num_bytes:
        yield f"{file} has {size} bytes, not {record.num_bytes}"
        return
    chunk_size, shard_size = array.chunks[0], array.shards[0]
    stop = min((number + 1) * shard_size, array.shape[0])
    content, damaged, highest = hashlib.sha256(), [], -1
    starts = range(number * shard_size, stop, chunk_size)
    for start in starts:
        try:
            values = np.asarray(array[start : min(start + chunk_size, stop)])
        except Exception as error:  # a checksum, the decoder, the file: zarr raises many kinds
            damaged.append((start // chunk_size, f"{type(error).__name__}: {' '.join(str(error).split())}"))
            continue
        content.update(values.tobytes())
        highest = max(highest, int(values.max(initial=0)))
    if damaged:
        chunk, reason = damaged[0]
        more = f", the first of {len(damaged)} damaged ones of {len(starts)}" if len(damaged) > 1 else ""
        yield f"{file}: chunk {chunk}{_documents_of(split, name, chunk)}{more}: {reason}"
    elif content.hexdigest() != record.sha256:
        yield f"{file}: sha256 of its elements is {content.hexdigest()[:16]}..., not {record.sha256[:16]}..."
    elif name == "tokens" and highest >= split.tokenizer.vocab_size:
        yield f"{file} holds id {highest}, the vocabulary has {split.tokenizer.vocab_size}"


def _documents_of(split: _Split, name: str, chunk: int) -> str:
    """Which documents lie in a chunk of tokens, where the index can still tell."""
    if name == "tokens":
        with suppress(Exception):
            first, last = (int(n) for n in split.arrays["chunk_first_document"][chunk : chunk + 2])
            return f" (documents {first}..{min(last, split.arrays['document_ends'].shape[0] - 1)})"
    return ""


def _verify_index(split: _Split) -> Iterator[str]:
    ends, num_tokens = split.arrays["document_ends"], split.arrays["tokens"].shape[0]
    found = np.asarray(split.arrays["chunk_first_document"][:])
    boundaries = np.arange(len(found)) * split.arrays["tokens"].chunks[0]
    expected = np.zeros(len(found), np.int64)
    before = 0
    for start in range(0, ends.shape[0], ENDS_PER_BLOCK):
        block = np.asarray(ends[start : start + ENDS_PER_BLOCK])
        falls = np.diff(block, prepend=before) <= 0
        if falls.any():
            number = start + int(np.argmax(falls))
            yield f"{split.path / 'document_ends'}: document {number} ends where it starts, or before"
            return
        expected += np.searchsorted(block, boundaries, side="right")
        before = int(block[-1])
    if before != num_tokens:
        yield f"{split.path / 'document_ends'}: the last document ends at {before}, there are {num_tokens} tokens"
    elif (wrong := np.flatnonzero(found != expected)).size:
        index = split.path / "chunk_first_document"
        yield f"{index}: {found[wrong[0]]} documents before chunk {wrong[0]}, not {expected[wrong[0]]}"
