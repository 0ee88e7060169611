"""What a corpus is on disk: names, sizes, element types and the fingerprint. Read and written by nothing else.

    CORPUS/
      corpus.json            summary, written last: a folder without it is an unfinished corpus
      tokenizer.json         the tokenizer that made the tokens
      rejected.jsonl         file, line and reason of every rejected line (only where there was one)
      train/  validation/    one zarr v3 group each:
        tokens               uint8/16/32 [num_tokens], documents one after another, each closed by the eos id
        document_ends        int64 [num_documents], exclusive end offset of every document, its eos included
        chunk_first_document int64 [num_token_chunks + 1], how many documents end at or before the start of chunk i:
                             the ends inside chunk i are document_ends[first[i]:first[i + 1]]

All arrays are sharded: zstd chunks, each with a crc32c, inside large shard files. Shards have their full nominal size
even where a corpus is smaller (the price is a 16 KiB index), so that a corpus can later grow by new shards without a
change of its metadata. `attrs["shards"]` of each array lists the bytes of every shard file and the sha256 of its
elements; the fingerprint of a split is a sha256 over those, so it can be checked without reading a token, and
computed by many writers in parallel.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

FORMAT_NAME = "engram-corpus"
FORMAT_VERSION = 1
SPLITS = ("train", "validation")
SUMMARY_FILE = "corpus.json"
TOKENIZER_FILE = "tokenizer.json"
REJECTED_FILE = "rejected.jsonl"
ARRAYS = ("tokens", "document_ends", "chunk_first_document")

DESCRIPTION = (
    "Tokenised text for language model pretraining. `tokens` holds all documents one after another, each closed by the "
    "end-of-document id `tokenizer.eos_token_id`; `document_ends[i]` is the exclusive end offset of document i in "
    "`tokens`; `chunk_first_document[c]` is the number of documents that end at or before the start of chunk c of "
    "`tokens`. Attribute `shards` of each array gives the bytes of every shard file and the sha256 of its elements "
    "(little-endian, without padding)."
)


@dataclass(frozen=True)
class ArraySizes:
    """Elements per chunk (the unit of reading) and per shard (the unit of files) of one array."""

    chunk: int
    shard: int

    def __post_init__(self) -> None:
        assert self.chunk > 0, self
        assert self.shard % self.chunk == 0, self

    def num_chunks(self, length: int) -> int:
        """Chunks that an array of `length` elements has."""
        return -(-length // self.chunk)

    def num_shards(self, length: int) -> int:
        """Shard files that an array of `length` elements has."""
        return -(-length // self.shard)


# 64k tokens compress to about 80 KB; 2^26 tokens to about 80 MB: 262B tokens are 3,904 files.
TOKEN_SIZES = ArraySizes(chunk=2**16, shard=2**26)
# A token chunk needs a few dozen ends, so these chunks are small.
DOCUMENT_SIZES = ArraySizes(chunk=2**12, shard=2**22)
INDEX_SIZES = ArraySizes(chunk=2**16, shard=2**26)


@dataclass(frozen=True)
class ShardRecord:
    """One shard file. `num_bytes`: its size on disk; `sha256`: of its elements, little-endian, without padding."""

    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class TokenizerIdentity:
    """Which tokenizer made the tokens. `vocab_size` is the largest id + 1, added tokens included."""

    name: str
    sha256: str  # of the tokenizer.json
    vocab_size: int
    eos_token_id: int


def partial_path(path: Path) -> Path:
    """Where the file or folder `path` is written until it is complete."""
    return path.with_name(path.name + ".partial")


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest unsigned integer that holds every id below `vocab_size`."""
    return next(np.dtype(t) for t in (np.uint8, np.uint16, np.uint32) if vocab_size - 1 <= np.iinfo(t).max)


def fingerprint_of(tokenizer: TokenizerIdentity, shards: dict[str, list[ShardRecord]]) -> str:
    """sha256 over the tokenizer's hash and the content hashes of all shards.

    Equal tokens and documents in shards of equal size give equal fingerprints; how the chunks were compressed does
    not enter, nor where the text came from.
    """
    content = {name: [record.sha256 for record in shards[name]] for name in ("tokens", "document_ends")}
    body = {"format_version": FORMAT_VERSION, "tokenizer_sha256": tokenizer.sha256, **content}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def shards_to_json(records: list[ShardRecord]) -> list[dict[str, Any]]:
    """`records` as zarr attributes."""
    return [asdict(record) for record in records]
