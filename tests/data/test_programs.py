"""The launch programs as a user runs them."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from engram_data.corpus import Corpus

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "data_pipeline/samples/sotu.jsonl.xz"


def command(program: str, *arguments: object) -> list[str]:
    return [sys.executable, str(ROOT / "launch" / program), *map(str, arguments)]


def run(program: str, *arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(program, *arguments), capture_output=True, text=True, **options)


def assert_one_line_error(result: subprocess.CompletedProcess[str], message: str) -> None:
    assert result.returncode == 2, result
    assert result.stdout == ""
    assert message in result.stderr
    assert result.stderr.count("\n") == 1, result.stderr


@pytest.fixture
def tokenizer_file(tmp_path: Path, tokenizer) -> Path:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(tokenizer.json_bytes)
    return path


@pytest.fixture
def text(tmp_path: Path, addresses: list[str]) -> Path:
    path = tmp_path / "text.jsonl"
    lines = [json.dumps({"text": address}) for address in addresses]
    path.write_text("\n".join([*lines[:5], "junk", *lines[5:]]))
    return path


def test_sample_text_becomes_a_tokenizer_and_a_corpus(tmp_path: Path) -> None:
    trained = run("train_tokenizer.py", SAMPLE, tmp_path / "t.json", "--vocab-size", 4096)
    assert trained.returncode == 0, trained.stderr
    assert "4,096 tokens from 233 documents" in trained.stdout
    built = run("build_corpus.py", SAMPLE, tmp_path / "out", "--tokenizer", tmp_path / "t.json", "--workers", 2)
    assert built.returncode == 0, built.stderr
    train, validation = (Corpus.open(tmp_path / "out", split) for split in ("train", "validation"))
    assert train.num_documents + validation.num_documents == 233
    assert validation.num_documents == 12
    assert f"train: 221 documents, {train.num_tokens:,} tokens, fingerprint {train.fingerprint}" in built.stdout
    assert train.tokenizer.vocab_size == 4096
    assert int(train.tokens(0, train.num_tokens).max()) < 4096


def test_deepseek_corpus_with_rejected_lines_is_reported(tmp_path: Path, text: Path) -> None:
    out = tmp_path / "out"
    built = run("build_corpus.py", text, "--tokenizer", "deepseek-v3", "--validation-fraction", 0.4, out)
    assert built.returncode == 0, built.stderr
    assert f"1 lines rejected, see {out / 'rejected.jsonl'}" in built.stdout
    assert json.loads((out / "rejected.jsonl").read_text())["line"] == 6
    corpus = Corpus.open(out, "train")
    assert (corpus.tokenizer.name, corpus.tokenizer.eos_token_id) == ("deepseek-v3", 1)
    assert corpus.tokens(0, 1).dtype.itemsize == 4


def test_user_errors_are_one_line_and_leave_nothing(tmp_path: Path, text: Path, tokenizer_file: Path) -> None:
    before = sorted(tmp_path.iterdir())
    junk = tmp_path / "text.jsonl"
    for arguments, message in (
        ((tmp_path / "no.jsonl", tmp_path / "out", "--tokenizer", tokenizer_file), "no such file or folder"),
        ((text, tmp_path / "out", "--tokenizer", "gpt-9"), "no tokenizer gpt-9"),
        ((text, tmp_path / "out", "--tokenizer", tokenizer_file, "--eos", "<x>"), "has no token '<x>'"),
        ((text, tmp_path / "out", "--tokenizer", tokenizer_file, "--validation-fraction", 2), "must lie in"),
        ((junk, tokenizer_file, "--tokenizer", tokenizer_file), "exists: choose another folder"),
        ((text, "/proc/out", "--tokenizer", tokenizer_file), "cannot write /proc/out.partial"),
    ):
        assert_one_line_error(run("build_corpus.py", *arguments), message)
    assert_one_line_error(run("train_tokenizer.py", text, tmp_path / "t.json", "--vocab-size", 100), "too small")
    assert_one_line_error(run("train_tokenizer.py", text, tokenizer_file, "--vocab-size", 300), "exists")
    assert sorted(tmp_path.iterdir()) == before


def test_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, text: Path, tokenizer_file: Path) -> None:
    before = sorted(tmp_path.iterdir())

    def files_of_at_most_8_kib() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))

    result = run(
        "build_corpus.py", text, tmp_path / "out", "--tokenizer", tokenizer_file, preexec_fn=files_of_at_most_8_kib
    )
    assert_one_line_error(result, "cannot write")
    assert sorted(tmp_path.iterdir()) == before


def test_terminated_build_is_kept_and_goes_on(tmp_path: Path, text: Path, tokenizer_file: Path) -> None:
    (tmp_path / "more").mkdir()
    sources = [text, tmp_path / "more"]
    (tmp_path / "more/sotu.jsonl.xz").symlink_to(SAMPLE)
    options = (*sources, tmp_path / "out", "--tokenizer", tokenizer_file, "--unit-mib", 0.01, "--workers", 1)
    process = subprocess.Popen(command("build_corpus.py", *options), stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "out.partial/pieces/00000000").exists():
        assert process.poll() is None, "the build ended before it could be stopped"
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143
    assert errors.splitlines()[-1].endswith(
        f"stopped: {tmp_path / 'out.partial'} is kept, the same command goes on; to start again remove it"
    )
    built = run("build_corpus.py", *options)
    assert built.returncode == 0, built.stderr
    assert built.stderr.startswith("going on: ")
    assert Corpus.open(tmp_path / "out", "train").num_documents > 200
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("program", ["build_corpus.py", "train_tokenizer.py"])
def test_help_shows_an_example(program: str) -> None:
    result = run(program, "--help")
    assert result.returncode == 0
    assert f"python launch/{program} data_pipeline/samples/sotu.jsonl.xz" in result.stdout
