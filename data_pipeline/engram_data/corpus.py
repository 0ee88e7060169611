"""Reads a corpus folder (see `corpus_format`): cheap verification when it is opened, then tokens by offset."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from engram_data.corpus_format import (
    ARRAYS,
    FORMAT_NAME,
    FORMAT_VERSION,
    SPLITS,
    SUMMARY_FILE,
    TOKENIZER_FILE,
    ShardRecord,
    TokenizerIdentity,
    fingerprint_of,
)
from engram_data.errors import CorpusError

# The chunks of one pool of the order (`order.POOL_GROUPS`) and those that its windows reach into: 84 MB of uint32.
CACHED_CHUNKS = 320


@dataclass(frozen=True, eq=False)
class _Chunk:
    """A decoded chunk: its tokens, and the document ends behind its first token, the end of the chunk included."""

    tokens: NDArray[Any]
    ends: NDArray[np.int64]


class Corpus:
    """One split of a corpus. Made by `Corpus.open`; not to be shared by threads."""

    def __init__(self, path: Path, group: Any, cached_chunks: int) -> None:
        self.path = path  # of the split
        self.tokenizer_file = path.parent / TOKENIZER_FILE
        attributes = dict(group.attrs)
        self.tokenizer = TokenizerIdentity(**attributes["tokenizer"])
        self.num_tokens = int(attributes["num_tokens"])
        self.num_documents = int(attributes["num_documents"])
        self.fingerprint = str(attributes["fingerprint"])
        self.sources: list[str] = list(attributes["sources"])
        self._arrays: dict[str, Any] = {name: group[name] for name in ARRAYS}
        self.chunk_tokens = int(self._arrays["tokens"].chunks[0])
        self._cached_chunks = cached_chunks
        self._cache: OrderedDict[int, _Chunk] = OrderedDict()

    @classmethod
    def open(cls, path: str | Path, split: str, cached_chunks: int = CACHED_CHUNKS) -> Corpus:
        """Open `split` (`train` or `validation`) of the corpus folder `path`; keeps `cached_chunks` decoded chunks.

        Checks everything but the tokens themselves (each chunk carries a checksum that reading verifies): the corpus
        is finished, of this version, its metadata whole and in agreement, its shard files present at full size, its
        tokenizer the one that made the tokens. Raises `CorpusError` otherwise.
        """
        assert split in SPLITS, split
        root = Path(path)
        summary = read_summary(root)
        try:
            corpus = cls(root / split, zarr.open_group(root / split, mode="r"), cached_chunks)
            shards = {name: [ShardRecord(**s) for s in corpus._arrays[name].attrs["shards"]] for name in ARRAYS}
            corpus._check_metadata(summary["splits"][split], shards)
        except CorpusError:
            raise
        except Exception as error:  # damaged JSON can raise anything in zarr
            raise _damaged(root / split, f"{type(error).__name__}: {error}") from None
        corpus._check_shard_files(shards)
        corpus._check_tokenizer_file()
        corpus._check_index()
        return corpus

    @cached_property
    def document_ends(self) -> NDArray[np.int64]:
        """int64[num_documents], exclusive end offsets, rising; all of them in memory (8 bytes a document)."""
        return self._read("document_ends", 0, self.num_documents)

    def tokens(self, start: int, stop: int) -> NDArray[Any]:
        """Tokens `start`..`stop`-1 in the stored unsigned type; a copy. Raises `CorpusError` for a damaged chunk."""
        assert 0 <= start <= stop <= self.num_tokens, (start, stop, self.num_tokens)
        result = np.empty(stop - start, self._arrays["tokens"].dtype)
        for chunk in range(start // self.chunk_tokens, -(-stop // self.chunk_tokens)):
            offset = chunk * self.chunk_tokens
            low, high = max(start, offset), min(stop, offset + self.chunk_tokens)
            result[low - start : high - start] = self._chunk(chunk).tokens[low - offset : high - offset]
        return result

    def document_ends_between(self, start: int, stop: int) -> NDArray[np.int64]:
        """The document ends e with `start` < e <= `stop`, i.e. the offsets there where a new document starts.

        Reads only the ends of the chunks that [start, stop] touches, whatever the number of documents.
        """
        assert 0 <= start <= stop <= self.num_tokens, (start, stop, self.num_tokens)
        chunks = range(start // self.chunk_tokens, -(-stop // self.chunk_tokens))
        ends = np.concatenate([np.empty(0, np.int64), *(self._chunk(chunk).ends for chunk in chunks)])
        low, high = np.searchsorted(ends, (start, stop), side="right")
        return ends[low:high]

    def document_range(self, number: int) -> tuple[int, int]:
        """Offsets of the first token of document `number` and behind its last, its eos; reads a chunk of ends."""
        assert 0 <= number < self.num_documents, (number, self.num_documents)
        ends = self._read("document_ends", max(0, number - 1), number + 1)
        return (int(ends[0]) if number else 0), int(ends[-1])

    def _chunk(self, chunk: int) -> _Chunk:
        found = self._cache.get(chunk)
        if found is not None:
            self._cache.move_to_end(chunk)
            return found
        start = chunk * self.chunk_tokens
        tokens = self._read("tokens", start, min(start + self.chunk_tokens, self.num_tokens))
        low, high = (int(first) for first in self._chunk_first_document[chunk : chunk + 2])
        decoded = _Chunk(tokens, self._read("document_ends", low, high))
        self._cache[chunk] = decoded
        if len(self._cache) > self._cached_chunks:
            self._cache.popitem(last=False)
        return decoded

    @cached_property
    def _chunk_first_document(self) -> NDArray[np.int64]:
        """int64[num_chunks + 1]: 32 MB for 262B tokens."""
        return self._read("chunk_first_document", 0, self._arrays["chunk_first_document"].shape[0])

    def _read(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Elements of an array; `CorpusError` names the array, the chunks and the shard file that cannot be read."""
        array = self._arrays[name]
        try:
            return np.asarray(array[start:stop])
        except (ValueError, RuntimeError, OSError) as error:  # a checksum, the decoder, the file
            chunk, shard = array.chunks[0], array.shards[0]
            last = max(start, stop - 1)
            raise CorpusError(
                f"{self.path / name}: chunk {start // chunk}..{last // chunk} (elements {start}..{last}, file "
                f"c/{start // shard}) is damaged, restore the file: {error}"
            ) from None

    def _check_metadata(self, summary: dict[str, Any], shards: dict[str, list[ShardRecord]]) -> None:
        num_chunks = -(-self.num_tokens // self.chunk_tokens)
        lengths = {
            "tokens": self.num_tokens,
            "document_ends": self.num_documents,
            "chunk_first_document": num_chunks + 1,
        }
        for name, expected in lengths.items():
            array = self._arrays[name]
            if array.shape != (expected,):
                raise _damaged(self.path, f"{name} has shape {array.shape}, the attributes say {expected}")
            if len(shards[name]) != -(-expected // array.shards[0]):
                raise _damaged(self.path, f"{name} lists {len(shards[name])} shards for {expected} elements")
        if self.fingerprint != fingerprint_of(self.tokenizer, shards):
            raise _damaged(self.path, "the fingerprint does not belong to the listed shards")
        for name in ("num_tokens", "num_documents", "fingerprint"):
            if getattr(self, name) != summary[name]:
                raise _damaged(self.path, f"{name} is {getattr(self, name)} here and {summary[name]} in {SUMMARY_FILE}")

    def _check_shard_files(self, shards: dict[str, list[ShardRecord]]) -> None:
        for name, records in shards.items():
            for number, record in enumerate(records):
                file = self.path / name / "c" / str(number)
                try:
                    size = file.stat().st_size
                except FileNotFoundError:
                    raise CorpusError(f"shard file {file} is missing: restore it, or build the corpus again") from None
                except OSError as error:
                    raise CorpusError(f"cannot read shard file {file}: {error.strerror}") from None
                if size != record.num_bytes:
                    raise CorpusError(
                        f"shard file {file} has {size} bytes, not {record.num_bytes}: it was cut or changed; "
                        "restore it, or build the corpus again"
                    )

    def _check_tokenizer_file(self) -> None:
        try:
            sha256 = hashlib.sha256(self.tokenizer_file.read_bytes()).hexdigest()
        except OSError as error:
            raise CorpusError(f"cannot read {self.tokenizer_file}: {error.strerror}") from None
        if sha256 != self.tokenizer.sha256:
            raise CorpusError(
                f"{self.tokenizer_file} is not the tokenizer that made the tokens (sha256 {sha256[:16]}..., expected "
                f"{self.tokenizer.sha256[:16]}...): restore it"
            )

    def _check_index(self) -> None:
        """The first and last entries; the ones between are protected by checksums."""
        first = self._chunk_first_document
        if first[0] != 0 or first[-1] != self.num_documents:
            raise _damaged(self.path, f"the chunk index counts {first[-1]} documents, not {self.num_documents}")
        if self.num_documents:
            end = int(self._read("document_ends", self.num_documents - 1, self.num_documents)[0])
            if end != self.num_tokens:
                raise _damaged(self.path, f"the last document ends at {end}, not at {self.num_tokens}")


def _damaged(path: Path, detail: str) -> CorpusError:
    detail = " ".join(detail.split())  # one line, whatever a library says
    return CorpusError(f"the metadata of {path} is damaged, restore it or build the corpus again: {detail}")


def read_summary(root: Path) -> dict[str, Any]:
    """The content of corpus.json, of a known version; `CorpusError` where there is none."""
    if not root.is_dir():
        raise CorpusError(f"no corpus at {root}: there is no such folder; make one with launch/build_corpus.py")
    file = root / SUMMARY_FILE
    try:
        summary = json.loads(file.read_text(encoding="utf-8"))
        name, version = summary["format"], summary["format_version"]
    except FileNotFoundError:
        raise CorpusError(
            f"{root} is no finished corpus, it has no {SUMMARY_FILE}: its build was interrupted, or it is no corpus"
        ) from None
    except OSError as error:
        raise CorpusError(f"cannot read {file}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(file, f"{type(error).__name__}: {error}") from None
    if (name, version) != (FORMAT_NAME, FORMAT_VERSION):
        raise CorpusError(
            f"{root} is of format {name} version {version}, this program reads {FORMAT_NAME} version {FORMAT_VERSION}: "
            "build the corpus again"
        )
    return dict(summary)
