"""What a corpus is, as a JSON-able dictionary: sizes, tokenizer, sources, and texts out of it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from engram_data.corpus import Corpus, read_summary
from engram_data.corpus_format import SPLITS

SAMPLE_TOKENS = 120  # of a document that are shown


def corpus_report(root: Path) -> dict[str, Any]:
    """Sizes and origin, without reading a token. Raises `CorpusError` as `Corpus.open`."""
    summary = read_summary(root)
    splits = {name: Corpus.open(root, name, cached_chunks=1) for name in SPLITS}
    return {
        "corpus": str(root),
        "format_version": summary["format_version"],
        "tokenizer": asdict(splits["train"].tokenizer),
        "splits": {name: _split_report(split) for name, split in splits.items()},
        "sources": summary["sources"],
        "validation_fraction": summary["validation_fraction"],
        "num_rejected": summary["num_rejected"],
    }


def _split_report(split: Corpus) -> dict[str, Any]:
    files = [file.stat().st_size for file in split.path.rglob("*") if file.is_file()]
    return {
        "documents": split.num_documents,
        "tokens": split.num_tokens,
        "bytes": sum(files),
        "bytes_per_token": sum(files) / split.num_tokens if split.num_tokens else None,
        "files": len(files),
        "fingerprint": split.fingerprint,
    }


def sample_texts(corpus: Corpus, count: int) -> list[dict[str, Any]]:
    """The first `SAMPLE_TOKENS` tokens of `count` documents evenly spread over the split, decoded.

    Each with `split`, `document`, `tokens` (of the whole document), `text`, and `is_cut`. Raises `CorpusError` for a
    damaged chunk.
    """
    tokenizer: Any = Tokenizer.from_file(str(corpus.tokenizer_file))
    samples = []
    count = min(count, corpus.num_documents)
    for i in range(count):
        number = i * corpus.num_documents // count
        start, stop = corpus.document_range(number)
        tokens = corpus.tokens(start, min(stop, start + SAMPLE_TOKENS)).tolist()
        samples.append(
            {
                "split": corpus.path.name,
                "document": number,
                "tokens": stop - start,
                "text": str(tokenizer.decode(tokens, skip_special_tokens=False)),
                "is_cut": stop - start > SAMPLE_TOKENS,
            }
        )
    return samples
