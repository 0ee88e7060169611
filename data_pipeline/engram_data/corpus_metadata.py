"""What a finished corpus says of itself: the attributes of its splits, its tokenizer and its summary."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import zarr

from engram_data.corpus_format import (
    DESCRIPTION,
    FORMAT_NAME,
    FORMAT_VERSION,
    SUMMARY_FILE,
    TOKENIZER_FILE,
    ShardRecord,
    TokenizerIdentity,
    fingerprint_of,
)
from engram_data.tokenizer import CorpusTokenizer


@dataclass(frozen=True)
class SplitSummary:
    """What one split holds."""

    num_tokens: int
    num_documents: int
    fingerprint: str


def describe_split(
    path: Path,
    tokenizer: TokenizerIdentity,
    sources: list[str],
    shards: dict[str, list[ShardRecord]],
    num_tokens: int,
    num_documents: int,
) -> SplitSummary:
    """Write the attributes of the zarr group at `path`, whose arrays are of `shards`."""
    summary = SplitSummary(num_tokens, num_documents, fingerprint_of(tokenizer, shards))
    zarr.open_group(path, mode="r+").attrs.update(
        {
            "description": DESCRIPTION,
            "format": FORMAT_NAME,
            "format_version": FORMAT_VERSION,
            "tokenizer": asdict(tokenizer),
            "sources": sources,
            **asdict(summary),
        }
    )
    return summary


def describe_corpus(
    path: Path,
    tokenizer: CorpusTokenizer,
    validation_fraction: float,
    num_rejected: int,
    sources: dict[str, dict[str, int]],
    splits: dict[str, SplitSummary],
) -> None:
    """Write the tokenizer and, last, the summary. `sources`: counts (documents, text_bytes) per source name."""
    (path / TOKENIZER_FILE).write_bytes(tokenizer.json_bytes)
    summary = {
        "format": FORMAT_NAME,
        "format_version": FORMAT_VERSION,
        "tokenizer": asdict(tokenizer.identity),
        "validation_fraction": validation_fraction,
        "num_rejected": num_rejected,
        "sources": sources,
        "splits": {name: asdict(split) for name, split in splits.items()},
    }
    (path / SUMMARY_FILE).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
