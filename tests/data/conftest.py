"""Small corpora, and a small tokenizer trained on real text."""

from __future__ import annotations

import json
import lzma
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from engram_data.corpus_format import ArraySizes
from engram_data.tokenizer import CorpusTokenizer
from engram_data.tokenizer_training import train_tokenizer
from engram_data.writer import CorpusWriter

SAMPLE = Path(__file__).parents[2] / "data_pipeline/samples/sotu.jsonl.xz"
SMALL_SIZES = ArraySizes(chunk=16, shard=64)

MakeCorpus = Callable[..., Path]


@pytest.fixture(scope="session")
def addresses() -> list[str]:
    """The first 12 State of the Union addresses."""
    with lzma.open(SAMPLE, "rt", encoding="utf-8") as stream:
        return [json.loads(next(stream))["text"] for _ in range(12)]


@pytest.fixture(scope="session")
def tokenizer(addresses: list[str]) -> CorpusTokenizer:
    """512 ids; `<|endoftext|>` = 1."""
    return CorpusTokenizer("small", train_tokenizer(addresses, 512).encode())


@pytest.fixture
def make_corpus(tmp_path: Path, tokenizer: CorpusTokenizer) -> MakeCorpus:
    """`make_corpus(train_documents, validation_documents=(), name="corpus", sizes=SMALL_SIZES)` -> folder."""

    def make(
        train: Sequence[Sequence[int]],
        validation: Sequence[Sequence[int]] = (),
        name: str = "corpus",
        sizes: ArraySizes = SMALL_SIZES,
    ) -> Path:
        with CorpusWriter(tmp_path / name, tokenizer, sizes) as writer:
            for document in train:
                writer.add(document, "train")
            for document in validation:
                writer.add(document, "validation")
            writer.finish({"made.txt": {"documents": len(train), "text_bytes": 0}}, 0.0)
        return tmp_path / name

    return make
