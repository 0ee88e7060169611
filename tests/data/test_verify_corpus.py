"""`verify_corpus` finds and names every kind of damage."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import zarr

from engram_data import verify_corpus as verify_module
from engram_data.corpus_format import ArraySizes, fingerprint_of
from engram_data.errors import CorpusError
from engram_data.shard_writer import ShardedArrayWriter
from engram_data.verify_corpus import shard_bytes, verify_corpus

RANDOM = np.random.default_rng(5)
TRAIN = [RANDOM.integers(2, 512, n).tolist() for n in (5, 40, 100, 16, 1, 15, 60)]
VALIDATION = [RANDOM.integers(2, 512, n).tolist() for n in (30, 2)]


@pytest.fixture
def corpus(make_corpus) -> Path:
    return make_corpus(TRAIN, VALIDATION)


def damage(corpus: Path) -> list[str]:
    return verify_corpus(corpus, lambda _bytes: None)


def flip(file: Path, place: int) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("block", [1, 3, 2**22])
def test_a_whole_corpus_has_no_damage_and_every_byte_is_reported(
    corpus: Path, make_corpus, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(verify_module, "ENDS_PER_BLOCK", block)
    seen: list[int] = []
    assert verify_corpus(corpus, seen.append) == []
    assert sum(seen) == shard_bytes(corpus)
    assert damage(make_corpus([], name="empty")) == []


def test_any_flipped_byte_of_a_shard_is_found(corpus: Path, tmp_path: Path) -> None:
    files = sorted(corpus.glob("*/*/c/*"))
    assert len(files) == 9  # four and one of tokens, and the indices
    for file in files:
        size = file.stat().st_size
        for place in (0, size // 3, size - 5, size - 1):
            copy = tmp_path / "copy"
            shutil.copytree(corpus, copy)
            broken = copy / file.relative_to(corpus)
            flip(broken, place)
            found = damage(copy)
            shutil.rmtree(copy)
            assert found, (file, place)
            assert all(str(broken) in problem for problem in found), found


def test_all_damage_is_named_at_once(corpus: Path) -> None:
    tokens = corpus / "train/tokens/c"
    flip(tokens / "0", 20)
    (tokens / "1").unlink()
    (tokens / "2").write_bytes((tokens / "2").read_bytes()[:-1])
    flip(corpus / "validation/document_ends/c/0", 3)
    (corpus / "tokenizer.json").write_bytes(b"{}")
    found = damage(corpus)
    assert len(found) == 5, found
    assert found[0].startswith(f"{tokens / '0'}: chunk 0 (documents 0..1): ")
    assert found[1] == f"{tokens / '1'}: No such file or directory"
    size = (tokens / "2").stat().st_size
    assert found[2] == f"{tokens / '2'} has {size} bytes, not {size + 1}"
    assert found[3].startswith(f"{corpus / 'tokenizer.json'} is not the tokenizer that made the tokens")
    assert found[4].startswith(f"{corpus / 'validation/document_ends/c/0'}: chunk 0: ")


def test_several_damaged_chunks_are_one_line(corpus: Path) -> None:
    file = corpus / "train/tokens/c/0"
    for place in (10, 60, 110):
        flip(file, place)
    (found,) = damage(corpus)
    assert "damaged ones of 4" in found


def test_shard_of_another_corpus_is_found_though_its_checksums_are_right(corpus: Path, make_corpus) -> None:
    other = make_corpus([document[::-1] for document in TRAIN], VALIDATION, name="other")
    file = corpus / "train/tokens/c/0"
    file.write_bytes((other / "train/tokens/c/0").read_bytes())
    set_record(corpus / "train", "tokens", 0, "num_bytes", file.stat().st_size)
    (found,) = damage(corpus)
    assert found.startswith(f"{file}: sha256 of its elements is ")


def set_record(split: Path, array: str, shard: int, key: str, value: object) -> None:
    attributes = zarr.open_group(split, mode="r+")[array].attrs
    records = list(attributes["shards"])
    records[shard][key] = value
    attributes["shards"] = records


def test_damaged_metadata_is_one_line_and_the_other_split_is_still_read(corpus: Path) -> None:
    (corpus / "train/zarr.json").write_text("{")
    flip(corpus / "validation/tokens/c/0", 3)
    found = damage(corpus)
    assert len(found) == 2, found
    assert str(corpus / "train") in found[0]
    assert str(corpus / "validation/tokens/c/0") in found[1]
    assert not any("\n" in problem for problem in found)


@pytest.mark.parametrize(
    ("array", "place", "value", "message"),
    [
        ("document_ends", 1, 6, "document_ends: document 1 ends where it starts, or before"),
        ("chunk_first_document", 3, 7, "chunk_first_document: 7 documents before chunk 3, not 2"),
        ("tokens", 5, 512, "tokens/c/0 holds id 512, the vocabulary has 512"),
    ],
)
def test_rules_between_arrays_are_checked(corpus: Path, array: str, place: int, value: int, message: str) -> None:
    """An array written anew with right checksums and fingerprint, but wrong content."""
    split = corpus / "train"
    group = zarr.open_group(split, mode="r")
    old = group[array]
    values = np.asarray(old[:])
    values[place] = value
    sizes = ArraySizes(old.chunks[0], old.shards[0])
    shutil.rmtree(split / array)
    writer = ShardedArrayWriter(split, array, values.dtype, sizes)
    writer.append(values)
    writer.close()
    opened = verify_module._Split.open(split)
    fingerprint = fingerprint_of(opened.tokenizer, opened.shards)
    zarr.open_group(split, mode="r+").attrs["fingerprint"] = fingerprint
    summary = json.loads((corpus / "corpus.json").read_text())
    summary["splits"]["train"]["fingerprint"] = fingerprint
    (corpus / "corpus.json").write_text(json.dumps(summary))
    (found,) = damage(corpus)
    assert message in found


def test_no_corpus_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="no corpus at"):
        damage(tmp_path / "no")
