"""Writes a corpus folder (see `corpus_format`) in one process, from token ids: in bounded memory, all or nothing."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import zarr
from numpy.typing import NDArray

from engram_data.corpus_format import (
    DOCUMENT_SIZES,
    INDEX_SIZES,
    SPLITS,
    TOKEN_SIZES,
    ArraySizes,
    TokenizerIdentity,
    partial_path,
    token_dtype,
)
from engram_data.corpus_metadata import SplitSummary, describe_corpus, describe_split
from engram_data.documents import with_eos
from engram_data.errors import CorpusError
from engram_data.shard_writer import ShardedArrayWriter
from engram_data.tokenizer import CorpusTokenizer


class SplitWriter:
    """Writes the zarr group of one split."""

    def __init__(self, path: Path, tokenizer: TokenizerIdentity, sizes: ArraySizes) -> None:
        self._path, self._tokenizer, self._sizes = path, tokenizer, sizes
        path.mkdir()
        self._tokens = ShardedArrayWriter(path, "tokens", token_dtype(tokenizer.vocab_size), sizes)
        self._ends = ShardedArrayWriter(path, "document_ends", np.dtype(np.int64), DOCUMENT_SIZES)
        self._first = ShardedArrayWriter(path, "chunk_first_document", np.dtype(np.int64), INDEX_SIZES)

    @property
    def num_tokens(self) -> int:
        """Tokens so far, eos included."""
        return self._tokens.length

    @property
    def num_documents(self) -> int:
        """Documents so far."""
        return self._ends.length

    def add(self, token_ids: NDArray[Any]) -> None:
        """Append one document, eos included."""
        end = self._tokens.length + len(token_ids)
        self._index_chunks_before(end)
        self._tokens.append(token_ids)
        self._ends.append(np.array([end], np.int64))

    def _index_chunks_before(self, end: int) -> None:
        """Chunks that start before `end` have no document end beyond those written already at or before their start."""
        count = self._sizes.num_chunks(end) - self._first.length
        self._first.append(np.full(count, self.num_documents, np.int64))

    def close(self, sources: list[str]) -> SplitSummary:
        """Write the rest and the group's attributes."""
        self._first.append(np.array([self.num_documents], np.int64))
        arrays = {"tokens": self._tokens, "document_ends": self._ends, "chunk_first_document": self._first}
        zarr.create_group(self._path, zarr_format=3)
        shards = {name: array.close() for name, array in arrays.items()}
        return describe_split(self._path, self._tokenizer, sources, shards, self.num_tokens, self.num_documents)

    def abandon(self) -> None:
        """Close open files."""
        for writer in (self._tokens, self._ends, self._first):
            writer.abandon()


class CorpusWriter:
    """`with CorpusWriter(out, tokenizer) as writer: writer.add(ids, "train") ...; writer.finish(...)`.

    Works in `OUT.partial` and renames it at the end; left without `finish`, it removes what it wrote.
    Raises `CorpusError` where OUT or OUT.partial exists, or the disk does not take the data.
    """

    def __init__(self, out: Path, tokenizer: CorpusTokenizer, token_sizes: ArraySizes = TOKEN_SIZES) -> None:
        self._out = out
        self._partial = partial_path(out)
        self._tokenizer, self._token_sizes = tokenizer, token_sizes
        self._finished = False

    def __enter__(self) -> Self:
        if self._out.exists():
            raise CorpusError(f"{self._out} exists: choose another folder, or remove it first")
        self._new_parents = [p for p in self._partial.parents if not p.exists()]
        try:
            self._partial.mkdir(parents=True)
        except FileExistsError:
            raise CorpusError(
                f"{self._partial} exists: another build is writing it, or was killed; in that case remove it"
            ) from None
        except OSError as error:
            raise CorpusError(f"cannot write {self._partial}: {error.strerror}") from None
        self._splits: dict[str, SplitWriter] = {}
        try:
            for split in SPLITS:
                self._splits[split] = SplitWriter(self._partial / split, self._tokenizer.identity, self._token_sizes)
        except BaseException:
            self._remove()
            raise
        return self

    def add(self, token_ids: Iterable[int] | NDArray[Any], split: str) -> None:
        """Append one document to `split`; its eos is added here. Raises `CorpusError` for an id out of range."""
        self._splits[split].add(with_eos(token_ids, self._tokenizer.identity))

    @property
    def num_documents(self) -> int:
        """Documents so far, of all splits."""
        return sum(split.num_documents for split in self._splits.values())

    @property
    def num_tokens(self) -> int:
        """Tokens so far, of all splits, eos included."""
        return sum(split.num_tokens for split in self._splits.values())

    def finish(self, sources: dict[str, dict[str, int]], validation_fraction: float) -> dict[str, SplitSummary]:
        """Complete the corpus and give it its name. `sources`: counts (documents, text_bytes) per source name."""
        summaries = {name: writer.close(list(sources)) for name, writer in self._splits.items()}
        describe_corpus(self._partial, self._tokenizer, validation_fraction, 0, sources, summaries)
        self._partial.rename(self._out)
        self._finished = True
        return summaries

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._finished:
            return
        self._remove()
        if isinstance(error, OSError):
            raise CorpusError(f"cannot write {self._partial}: {error.strerror or error}") from None

    def _remove(self) -> None:
        for writer in self._splits.values():
            writer.abandon()
        shutil.rmtree(self._partial, ignore_errors=True)
        for parent in self._new_parents:
            with suppress(OSError):
                parent.rmdir()
