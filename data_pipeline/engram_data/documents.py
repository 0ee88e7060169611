"""What becomes of one document: its split, and its token ids as they are stored."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram_data.corpus_format import TokenizerIdentity
from engram_data.errors import CorpusError


def check_validation_fraction(fraction: float) -> None:
    """Raises `CorpusError` for a share that is none, or leaves nothing to train on."""
    if not 0 <= fraction < 1:
        raise CorpusError(f"validation fraction {fraction} must lie in 0 <= fraction < 1")


def split_of(content: bytes, validation_fraction: float) -> str:
    """`train` or `validation`, from the sha256 of `content` alone: the same in any order, run and number of processes.

    Equal documents fall into the same split. `content`: the text of a document in UTF-8, or its ids as little-endian
    uint32 without eos where only ids are known.
    """
    leading = int.from_bytes(hashlib.sha256(content).digest()[:8], "big")
    return "validation" if leading < validation_fraction * 2**64 else "train"


def with_eos(token_ids: Iterable[int] | NDArray[Any], tokenizer: TokenizerIdentity) -> NDArray[np.int64]:
    """`token_ids` and the eos. Raises `CorpusError` for an id out of the vocabulary."""
    ids = np.asarray(token_ids if isinstance(token_ids, np.ndarray) else list(token_ids), np.int64)
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < tokenizer.vocab_size:
        raise CorpusError(
            f"token ids {ids.min()}..{ids.max()} are not in 0..{tokenizer.vocab_size - 1}, "
            f"the vocabulary of {tokenizer.name}"
        )
    return np.append(ids, tokenizer.eos_token_id)
