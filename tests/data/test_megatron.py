"""Megatron's .bin and .idx: out, in, and read by megatron-core itself."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from small_disk import small_disk

from engram_data import megatron_format
from engram_data.corpus import Corpus
from engram_data.corpus_format import ArraySizes
from engram_data.documents import split_of
from engram_data.errors import CorpusError
from engram_data.megatron_export import export_megatron, open_splits
from engram_data.megatron_format import HEADER, MAGIC, MegatronDataset, token_type
from engram_data.megatron_import import import_megatron

ROOT = Path(__file__).parents[2]
SMALL_SIZES = ArraySizes(chunk=16, shard=64)
EOS = 1
RANDOM = np.random.default_rng(3)
TRAIN = [RANDOM.integers(2, 512, n).tolist() for n in (5, 40, 0, 100, 16, 1, 15)]
VALIDATION = [RANDOM.integers(2, 512, n).tolist() for n in (30, 2)]


def write_dataset(prefix: Path, documents: list[list[list[int]]], dtype: type = np.int32) -> Path:
    """`documents` of sequences, written by struct as the format's description says."""
    sequences = [sequence for document in documents for sequence in document]
    lengths = [len(sequence) for sequence in sequences]
    item_bytes = np.dtype(dtype).itemsize
    pointers = [sum(lengths[:i]) * item_bytes for i in range(len(lengths))]
    indices = np.cumsum([0] + [len(document) for document in documents])
    code = {np.uint8: 1, np.int32: 4, np.int64: 5, np.float32: 7, np.uint16: 8}[dtype]
    index = struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, code, len(sequences), len(indices))
    index += np.array(lengths, np.int32).tobytes() + np.array(pointers, np.int64).tobytes()
    prefix.with_name(prefix.name + ".idx").write_bytes(index + indices.astype(np.int64).tobytes())
    tokens = np.array([token for sequence in sequences for token in sequence], dtype)
    prefix.with_name(prefix.name + ".bin").write_bytes(tokens.tobytes())
    return prefix


def documents_of(corpus: Path, split: str) -> list[list[int]]:
    opened = Corpus.open(corpus, split)
    tokens = opened.tokens(0, opened.num_tokens)
    return [document.tolist() for document in np.split(tokens, opened.document_ends[:-1])] if len(tokens) else []


def take(train, out: Path, tokenizer, validation=(), fraction: float = 0.0):
    return import_megatron(train, validation, out, tokenizer, fraction, lambda _tokens: None, SMALL_SIZES)


def export(corpus: Path, prefix: Path):
    return export_megatron(open_splits(corpus), prefix, lambda _tokens: None)


def test_out_and_in_again_is_the_same_corpus(tmp_path: Path, tokenizer, make_corpus) -> None:
    corpus = make_corpus(TRAIN, VALIDATION)
    exported = export(corpus, tmp_path / "made/mine")
    assert [(split.prefix.name, split.num_documents) for split in exported] == [
        ("mine_train", 7),
        ("mine_validation", 2),
    ]
    assert sorted(file.name for file in (tmp_path / "made").iterdir()) == [
        f"mine_{split}.{kind}" for split in ("train", "validation") for kind in ("bin", "idx")
    ]
    summary = take([exported[0].prefix], tmp_path / "again", tokenizer, [exported[1].prefix])
    assert summary.num_eos_added == 0
    for split in ("train", "validation"):
        before, after = Corpus.open(corpus, split), Corpus.open(tmp_path / "again", split)
        assert after.fingerprint == before.fingerprint
        assert documents_of(tmp_path / "again", split) == documents_of(corpus, split)


def test_in_and_out_again_is_the_same_files(tmp_path: Path, tokenizer) -> None:
    documents = [[[*document, EOS]] for document in TRAIN]
    taken = write_dataset(tmp_path / "taken", documents, np.uint16)
    take([taken], tmp_path / "corpus", tokenizer)
    (exported,) = export(tmp_path / "corpus", tmp_path / "given")
    for kind in (".bin", ".idx"):
        assert Path(f"{exported.prefix}{kind}").read_bytes() == Path(f"{taken}{kind}").read_bytes()


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint16])
@pytest.mark.parametrize("block", [1, 7, 2**20])
def test_sequences_of_a_document_are_joined_and_closed_once(
    tmp_path: Path, tokenizer, monkeypatch: pytest.MonkeyPatch, dtype: type, block: int
) -> None:
    monkeypatch.setattr(megatron_format, "BLOCK_TOKENS", block)
    monkeypatch.setattr(megatron_format, "BLOCK_SEQUENCES", min(block, 3))
    first = write_dataset(tmp_path / "first", [[[5, 6], [7], [8, EOS]], [], [[9, EOS, EOS]], [[10]]], dtype)
    second = write_dataset(tmp_path / "second", [[[EOS]], [[11, 12], []]], dtype)
    summary = take([first, second], tmp_path / "corpus", tokenizer)
    expected = [[5, 6, 7, 8, EOS], [EOS], [9, EOS, EOS], [10, EOS], [EOS], [11, 12, EOS]]
    assert documents_of(tmp_path / "corpus", "train") == expected
    assert (summary.num_documents, summary.num_eos_added) == (6, 3)
    told = json.loads((tmp_path / "corpus/corpus.json").read_text())["sources"]
    assert told == {str(first): {"documents": 4, "tokens": 11}, str(second): {"documents": 2, "tokens": 4}}


def test_held_out_documents_depend_on_their_ids_alone(tmp_path: Path, tokenizer) -> None:
    documents = [RANDOM.integers(2, 512, 6).tolist() for _ in range(200)]
    plain = write_dataset(tmp_path / "plain", [[document] for document in documents])
    closed = write_dataset(tmp_path / "closed", [[[*document, EOS]] for document in documents[::-1]], np.uint16)
    held_out = []
    for prefix in (plain, closed):
        take([prefix], tmp_path / f"corpus_{prefix.name}", tokenizer, fraction=0.2)
        held_out.append(sorted(documents_of(tmp_path / f"corpus_{prefix.name}", "validation")))
    assert held_out[0] == held_out[1]
    expected = [d for d in documents if split_of(np.array(d, "<u4").tobytes(), 0.2) == "validation"]
    assert 20 < len(expected) < 60
    assert held_out[0] == sorted([*document, EOS] for document in expected)


def test_megatron_core_reads_what_is_exported(tmp_path: Path, make_corpus) -> None:
    corpus = make_corpus(TRAIN, VALIDATION)
    prefix = export(corpus, tmp_path / "mine")[0].prefix
    command = [sys.executable, str(ROOT / "tests/data/megatron_reader.py"), str(prefix), "32"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    read = json.loads(result.stdout.splitlines()[-1])
    documents = documents_of(corpus, "train")
    assert read["dtype"] == "uint16"
    assert read["sequences"] == documents
    assert read["document_indices"] == list(range(len(documents) + 1))
    text = [token for number in read["document_order"] for token in documents[number]]
    assert sorted(read["document_order"]) == list(range(len(documents)))
    assert len(read["windows"]) == (len(text) - 1) // 32
    assert read["windows"] == [text[32 * window : 32 * window + 32] for window in read["window_order"]]


@pytest.mark.parametrize(
    ("vocab_size", "name"), [(2, "uint16"), (65499, "uint16"), (65500, "int32"), (129280, "int32")]
)
def test_type_is_megatrons_choice(vocab_size: int, name: str) -> None:
    assert token_type(vocab_size).name == name


def test_empty_split_is_not_exported(tmp_path: Path, make_corpus) -> None:
    assert [split.prefix.name for split in export(make_corpus(TRAIN), tmp_path / "mine")] == ["mine_train"]
    with pytest.raises(CorpusError, match="holds no document"):
        open_splits(make_corpus([], name="empty"))


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (".idx", None, r"no .*set\.idx"),
        (".bin", None, r"no .*set\.bin"),
        (".bin", lambda b: b[:-1], "has 31 bytes, the index tells of 8 tokens of 4 bytes = 32"),
        (".bin", lambda b: b + b"1234", "has 36 bytes"),
        (".idx", lambda b: b"PK" + b[2:], "is no index of Megatron's IndexedDataset"),
        (".idx", lambda _: b"", "is no index"),
        (".idx", lambda b: b[:20], "has 20 bytes, its header alone has 34"),
        (".idx", lambda b: b[:-1], "it was cut or changed"),
        (".idx", lambda b: HEADER.pack(MAGIC, 2, 4, 3, 3) + b[34:], "is of version 2"),
        (".idx", lambda b: HEADER.pack(MAGIC, 1, 7, 3, 3) + b[34:], "elements of type 7, not of token ids"),
        (".idx", lambda b: HEADER.pack(MAGIC, 1, 99, 3, 3) + b[34:], "elements of type 99"),
        (".idx", lambda b: b + bytes(3), "multimodal"),
        (".idx", lambda b: b[:34] + b"\x09" + b[35:], "sequence 1 of 3 tokens at byte 8, not 36"),
        (".idx", lambda b: b[:-8] + b"\x02" + b[-7:], "its documents are sequences 0..2 of 0..3"),
        (".idx", lambda b: b[:-16] + b"\x04" + b[-15:], "document 1 ends before it starts"),
    ],
)
def test_damaged_datasets_are_refused(tmp_path: Path, file: str, change, message: str) -> None:
    prefix = write_dataset(tmp_path / "set", [[[5, 6], [7, 8, 9]], [[10, 11, EOS]]])
    path = Path(f"{prefix}{file}")
    path.unlink() if change is None else path.write_bytes(change(path.read_bytes()))
    with pytest.raises(CorpusError, match=message):
        MegatronDataset.open(prefix)


def test_ids_beyond_the_vocabulary_are_named_and_nothing_is_left(tmp_path: Path, tokenizer) -> None:
    prefix = write_dataset(tmp_path / "set", [[[5, 6]], [[7, 512]]])
    with pytest.raises(
        CorpusError, match=r"set, document 1: token ids 7..512 are not in 0..511, the vocabulary of small"
    ):
        take([prefix], tmp_path / "out", tokenizer)
    negative = write_dataset(tmp_path / "negative", [[[-1, 6]]])
    with pytest.raises(CorpusError, match=r"token ids -1..6"):
        take([negative], tmp_path / "out", tokenizer)
    assert not list(tmp_path.glob("out*"))


def run(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "launch/convert_corpus.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


def test_program_converts_and_tells_mistakes_in_one_line(tmp_path: Path, tokenizer, make_corpus) -> None:
    (tmp_path / "t.json").write_bytes(tokenizer.json_bytes)
    corpus = make_corpus(TRAIN, VALIDATION)
    given = run("export", corpus, tmp_path / "mine")
    assert given.returncode == 0, given.stderr
    assert "mine_train: 7 documents, 184 tokens of uint16" in given.stdout
    parts = (tmp_path / "mine_train", tmp_path / "mine_validation")
    taken = run("import", *parts, tmp_path / "again", "--tokenizer", tmp_path / "t.json")
    assert taken.returncode == 0, taken.stderr
    assert "9 documents ended with the eos id 1 and kept it, 0 got one" in taken.stdout
    before = sorted(tmp_path.iterdir())
    named = ("--tokenizer", tmp_path / "t.json")
    for arguments, message in (
        (("export", corpus, tmp_path / "mine"), "mine_train.bin exists: choose another prefix"),
        (("export", tmp_path / "no", tmp_path / "x"), "no corpus at"),
        (("export", corpus, "/proc/x"), "cannot write /proc/x"),
        (("import", tmp_path / "no", tmp_path / "x", *named), "no.idx: a Megatron dataset is PREFIX.idx"),
        (("import", parts[0], corpus, *named), "exists: choose another folder"),
        (("import", parts[0], parts[0], tmp_path / "x", *named), "is given twice"),
        (("import", parts[0], tmp_path / "x", *named, "--validation-fraction", 1), "must lie in"),
    ):
        result = run(*arguments)
        assert (result.returncode, result.stdout) == (2, ""), (arguments, result)
        assert message in result.stderr
        assert result.stderr.count("\n") == 1, result.stderr
    assert sorted(tmp_path.iterdir()) == before


def test_full_disk_leaves_nothing(tmp_path: Path, tokenizer) -> None:
    long = write_dataset(tmp_path / "long", [[RANDOM.integers(2, 512, 20_000).tolist()] for _ in range(4)])
    take([long], tmp_path / "corpus", tokenizer)
    with small_disk(tmp_path / "disk", "60k") as disk:
        with pytest.raises(CorpusError, match=r"cannot write .*mine: No space left on device"):
            export(tmp_path / "corpus", disk / "mine")
        with pytest.raises(CorpusError, match="cannot write"):
            take([long], disk / "corpus", tokenizer)
        assert list(disk.iterdir()) == []
