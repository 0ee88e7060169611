"""The n-gram hash that goes with a tokenizer.json."""

from __future__ import annotations

from pathlib import Path

from engram_megatron.config import RunConfig
from engram_megatron.hashing.ngram_hasher import NgramHasher
from engram_megatron.hashing.vocab_projection import build_vocab_projection, identity_projection


def folder_hasher(config: RunConfig, tokenizer_json: Path) -> NgramHasher | None:
    """The hasher of `config`, None without Engram. Raises `UsageError` for a file that is no tokenizer of the model."""
    if config.engram is None:
        return None
    vocab_size = config.model.vocab_size
    if config.engram.compression:
        projection = build_vocab_projection(tokenizer_json)
    else:
        projection = identity_projection(vocab_size)
    return NgramHasher.from_config(config.engram, projection, vocab_size)
