"""`launch/corpus_info.py` as a user runs it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

from engram_data.corpus import Corpus

PROGRAM = Path(__file__).parents[2] / "launch/corpus_info.py"


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(PROGRAM), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_everything_is_told_as_text_and_as_json(tiny_corpus: Path) -> None:
    asked = (tiny_corpus, "--verify", "--samples", 2, "--engram", "engram_tiny", "engram.rows_per_head=1009")
    told = run(*asked)
    assert told.returncode == 0, told.stderr
    corpus = Corpus.open(tiny_corpus, "train")
    for words in (
        f"{corpus.num_documents:,} documents, {corpus.num_tokens:,} tokens",
        f"fingerprint {corpus.fingerprint}",
        "whole        every size, sha256",
        f"of {corpus.num_tokens:,} training tokens in ",
        "3-grams",
        "rows read    by engram_tiny, 8 of the 8 sequences of a batch",
        "document 0 (",
    ):
        assert words in told.stdout, told.stdout
    report = json.loads(run(*asked, "--json").stdout)
    assert report["damage"] == []
    assert report["splits"]["train"]["fingerprint"] == corpus.fingerprint
    assert [rows["num_sequences"] for rows in report["engram"]["batches"]] == [1, 4, 8]
    assert [order["order"] for order in report["ngrams"]["orders"]] == [1, 2, 3]
    assert len(report["samples"]) == 2


def test_damage_is_named_with_exit_code_1(tiny_corpus: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_corpus, tmp_path / "corpus")
    file = tmp_path / "corpus/train/tokens/c/0"
    data = bytearray(file.read_bytes())
    data[1000] ^= 1
    file.write_bytes(data)
    result = run(tmp_path / "corpus", "--verify")
    assert result.returncode == 1
    assert result.stdout.startswith(f"damaged      {file}: chunk 0 (documents 0..")
    assert result.stdout.count("\n") == 1
    assert result.stderr == ""
    unread = run(tmp_path / "corpus", "--ngram-tokens", 0)
    assert unread.returncode == 0, unread.stderr
    assert "whole" not in unread.stdout


def test_mistakes_are_one_line(tiny_corpus: Path, tmp_path: Path) -> None:
    for arguments, message in (
        ((tmp_path / "no",), "no corpus at"),
        ((tmp_path / "no", "--verify"), "no corpus at"),
        ((tmp_path,), "is no finished corpus"),
        ((tiny_corpus, "a.b=1"), "belongs to --engram"),
        ((tiny_corpus, "--samples", -1), "--samples -1 is negative"),
        ((tiny_corpus, "--engram", "engram_9b"), "unknown preset 'engram_9b'"),
        ((tiny_corpus, "--engram", "dense_4b"), "has no Engram"),
        ((tiny_corpus, "--engram", "engram_tiny", "engram.rows=1"), "unknown key"),
    ):
        result = run(*arguments)
        assert (result.returncode, result.stdout) == (2, ""), (arguments, result)
        assert message in result.stderr
        assert result.stderr.count("\n") == 1, result.stderr
