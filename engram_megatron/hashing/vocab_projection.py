"""Vocabulary projection V -> V' (Engram, arXiv 2601.07372, section 2.2): ids whose normalised text is equal are one id.

The rule is the one of DeepSeek's demo and of the DeepSeek-V4.1 release. Tokens are decoded by the `tokenizers`
library directly, without the `clean_up_tokenization_spaces` that Hugging Face wrappers can add; for DeepSeek's
tokenizers, which do not clean up, both agree.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, normalizers

from engram_megatron.errors import UsageError

REPLACEMENT_CHARACTER = "\ufffd"  # what decoding gives for bytes that are not a whole character
SINGLE_SPACE = "\ue000"  # private use: carries a lone space past Strip


@dataclass(frozen=True, eq=False)
class VocabProjection:
    """`lookup` int64 [V], read-only: token id -> compressed id in 0..compressed_size - 1."""

    lookup: NDArray[np.int64]
    compressed_size: int

    def __post_init__(self) -> None:
        assert self.lookup.dtype == np.int64
        assert self.lookup.ndim == 1
        self.lookup.flags.writeable = False

    @property
    def digest(self) -> str:
        """sha256 of the table as little-endian int64, in hexadecimal."""
        return hashlib.sha256(self.lookup.astype("<i8").tobytes()).hexdigest()

    def extended(self, vocab_size: int, pad_token_id: int) -> VocabProjection:
        """The same projection over `vocab_size` ids: those that the tokenizer lacks become the compressed pad id.

        Models round their vocabulary up (DeepSeek-V3: 128,815 ids in the tokenizer, 129,280 in the model). The
        additional ids get no compressed ids of their own, for `compressed_size` fixes the hash's multipliers: another
        size would be another hash, and an id at or above it could overflow the int64 product.

        Raises `UsageError` where the tokenizer has more ids than the model, or no `pad_token_id`.
        """
        known = len(self.lookup)
        if known > vocab_size:
            raise UsageError(
                f"the tokenizer has {known} ids, more than model.vocab_size = {vocab_size}: "
                f"set model.vocab_size to at least {known} or use the model's own tokenizer"
            )
        if not 0 <= pad_token_id < known:
            raise UsageError(
                f"engram.pad_token_id = {pad_token_id} is not an id of the tokenizer: choose one of 0..{known - 1}"
            )
        rest = np.full(vocab_size - known, self.lookup[pad_token_id], dtype=np.int64)
        return VocabProjection(np.concatenate([self.lookup, rest]), self.compressed_size)


def identity_projection(vocab_size: int) -> VocabProjection:
    """Compression switched off: every id is its own."""
    return VocabProjection(np.arange(vocab_size, dtype=np.int64), vocab_size)


def build_vocab_projection(tokenizer_json: Path) -> VocabProjection:
    """The projection of the tokenizer in the file `tokenizer_json` (Hugging Face format), added tokens included.

    Compressed ids count up in the order in which a class first appears among rising token ids. Takes about a second
    per 100,000 ids. Raises `UsageError` for a file that is missing or no tokenizer, or whose ids have gaps.
    """
    tokenizer = _load(tokenizer_json)
    normalizer = text_normalizer()
    classes: dict[str, int] = {}
    lookup = np.empty(tokenizer.get_vocab_size(with_added_tokens=True), dtype=np.int64)
    for token_id in range(len(lookup)):
        key = _class_key(tokenizer, normalizer, token_id)
        lookup[token_id] = classes.setdefault(key, len(classes))
    return VocabProjection(lookup, len(classes))


def text_normalizer() -> normalizers.Normalizer:
    """What makes two texts equal: compatibility forms, accents, case and the length of white space do not count."""
    return normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.NFD(),
            normalizers.StripAccents(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"[ \t\r\n]+"), " "),
            normalizers.Replace(Regex(r"^ $"), SINGLE_SPACE),
            normalizers.Strip(),
            normalizers.Replace(SINGLE_SPACE, " "),
        ]
    )


def _class_key(tokenizer: Tokenizer, normalizer: normalizers.Normalizer, token_id: int) -> str:
    text: str = tokenizer.decode([token_id], skip_special_tokens=False)
    if REPLACEMENT_CHARACTER in text:  # part of a character: only its bytes can tell it from others
        raw: str | None = tokenizer.id_to_token(token_id)
        assert raw is not None, "ids were checked to have no gaps"
        return raw
    return normalizer.normalize_str(text) or text


def _load(tokenizer_json: Path) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_file(str(tokenizer_json))
    except Exception as error:  # the library raises plain Exception for a missing as for a malformed file
        raise UsageError(f"cannot read the tokenizer {tokenizer_json}: {error}") from error
    ids = sorted(tokenizer.get_vocab(with_added_tokens=True).values())
    size = tokenizer.get_vocab_size(with_added_tokens=True)
    if ids != list(range(size)):
        raise UsageError(
            f"the tokenizer {tokenizer_json} has {size} tokens but ids up to {ids[-1] if ids else None}: its ids have "
            "gaps or repeats, which the projection has no rule for; set engram.compression=false"
        )
    return tokenizer
