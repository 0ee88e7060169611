"""Trains a small byte-level BPE tokenizer on text files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from engram_data.corpus_format import partial_path
from engram_data.errors import CorpusError
from engram_data.text_source import Rejection, find_text_files, read_documents

SPECIAL_TOKENS = ("<|bos|>", "<|endoftext|>", "<|pad|>")  # ids 0, 1, 2
MIN_VOCAB_SIZE = len(SPECIAL_TOKENS) + 256  # and all bytes


@dataclass(frozen=True)
class TrainedTokenizer:
    """What `train_tokenizer_file` did; `sha256` of the file."""

    sha256: str
    num_documents: int
    rejections: list[Rejection]


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> str:
    """Byte-level BPE (GPT-2's: no normaliser, no added space) on `texts`; returns the content of a tokenizer.json.

    Ids 0, 1, 2 are `SPECIAL_TOKENS`; every byte has an id. Deterministic in the texts and `vocab_size`.
    Raises `CorpusError` where `vocab_size` cannot be reached.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise CorpusError(
            f"vocabulary size {vocab_size} is too small: {len(SPECIAL_TOKENS)} special tokens and 256 bytes "
            f"need {MIN_VOCAB_SIZE}"
        )
    tokenizer: Any = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    reached = tokenizer.get_vocab_size()
    if reached < vocab_size:
        raise CorpusError(f"the text yields only {reached} tokens, not {vocab_size}: give more text, or a smaller size")
    return str(tokenizer.to_str(pretty=True))


def train_tokenizer_file(sources: list[str], out: Path, vocab_size: int) -> TrainedTokenizer:
    """Train on files and folders of text and write the tokenizer.json `out`. Raises `CorpusError`; `out` is written
    whole or not at all."""
    if out.exists():
        raise CorpusError(f"{out} exists: choose another file, or remove it first")
    files = find_text_files(sources)
    rejections: list[Rejection] = []
    num_documents = 0

    def texts() -> Iterator[str]:
        nonlocal num_documents
        for document in read_documents(files, rejections.append):
            num_documents += 1
            yield document.text

    content = train_tokenizer(texts(), vocab_size).encode("utf-8")
    partial = partial_path(out)
    try:
        partial.write_bytes(content)
        partial.rename(out)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise CorpusError(f"cannot write {out}: {error.strerror}") from None
    return TrainedTokenizer(hashlib.sha256(content).hexdigest(), num_documents, rejections)
