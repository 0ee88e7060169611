"""Reading a corpus: what was written comes back, and every kind of damage is one clear line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import zarr

from engram_data.corpus import Corpus
from engram_data.corpus_format import FORMAT_VERSION, token_dtype
from engram_data.errors import CorpusError

RNG = np.random.default_rng(0)
# Documents of 0..60 tokens over chunks of 16 and shards of 64: several ends in one chunk, chunks without an end,
# ends on chunk and shard borders, a partial last chunk.
DOCUMENTS = [RNG.integers(3, 512, size).tolist() for size in (5, 9, 15, 1, 60, 0, 0, 31, 64, 2, 7, 40, 3)]
FLAT = np.array([token for document in DOCUMENTS for token in [*document, 1]])
ENDS = np.cumsum([len(document) + 1 for document in DOCUMENTS])


@pytest.fixture
def folder(make_corpus) -> Path:
    return make_corpus(DOCUMENTS, [[7, 8, 9]])


def open_error(folder: Path, split: str = "train") -> str:
    with pytest.raises(CorpusError) as caught:
        Corpus.open(folder, split)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def change_json(file: Path, **changes: object) -> None:
    content = json.loads(file.read_text())
    target = content.get("attributes", content)
    assert changes.keys() <= target.keys()
    target.update(changes)
    file.write_text(json.dumps(content))


@pytest.mark.parametrize("cached_chunks", [1, 3, 100])
def test_any_slice_of_tokens_and_ends_comes_back(folder: Path, cached_chunks: int) -> None:
    corpus = Corpus.open(folder, "train", cached_chunks)
    assert corpus.tokens(0, 0).shape == (0,)
    np.testing.assert_array_equal(corpus.tokens(0, corpus.num_tokens), FLAT)
    np.testing.assert_array_equal(corpus.document_ends, ENDS)
    for start, stop in np.sort(RNG.integers(0, len(FLAT) + 1, (60, 2)), axis=1).tolist():
        np.testing.assert_array_equal(corpus.tokens(start, stop), FLAT[start:stop])
        expected = [end for end in ENDS if start < end <= stop]
        np.testing.assert_array_equal(corpus.document_ends_between(start, stop), expected)


def test_attributes_tell_what_was_written(folder: Path, tokenizer) -> None:
    train, validation = Corpus.open(folder, "train"), Corpus.open(folder, "validation")
    assert (train.num_tokens, train.num_documents) == (len(FLAT), len(DOCUMENTS))
    assert (validation.num_tokens, validation.num_documents) == (4, 1)
    assert train.tokenizer == tokenizer.identity
    assert train.tokenizer_file.read_bytes() == tokenizer.json_bytes
    assert train.sources == ["made.txt"]
    assert len(train.fingerprint) == 64
    assert train.fingerprint != validation.fingerprint


def test_plain_zarr_python_reads_a_corpus(folder: Path) -> None:
    group = zarr.open_group(folder / "train", mode="r")
    np.testing.assert_array_equal(group["tokens"][:], FLAT)
    np.testing.assert_array_equal(group["document_ends"][:], ENDS)
    assert group["tokens"].dtype == np.uint16  # 512 ids
    assert group["tokens"].chunks == (16,)
    assert group["tokens"].shards == (64,)
    assert "document_ends" in group.attrs["description"]


def test_chunk_index_counts_the_ends_at_or_before_each_chunk(folder: Path) -> None:
    index = zarr.open_group(folder / "train", mode="r")["chunk_first_document"][:]
    starts = [*range(0, len(FLAT), 16), len(FLAT)]
    np.testing.assert_array_equal(index, [int((start >= ENDS).sum()) for start in starts])


@pytest.mark.parametrize(("vocab_size", "dtype"), [(1, "u1"), (256, "u1"), (257, "u2"), (65536, "u2"), (65537, "u4")])
def test_token_type_is_the_smallest_that_holds_the_vocabulary(vocab_size: int, dtype: str) -> None:
    assert token_dtype(vocab_size) == np.dtype(dtype)


def test_empty_split_opens(make_corpus) -> None:
    corpus = Corpus.open(make_corpus(DOCUMENTS), "validation")
    assert corpus.num_tokens == 0
    assert corpus.document_ends.shape == (0,)


def test_missing_folder_is_named(tmp_path: Path) -> None:
    assert "there is no such folder" in open_error(tmp_path / "nothing")


def test_folder_without_its_summary_is_unfinished(folder: Path) -> None:
    (folder / "corpus.json").unlink()
    assert "no finished corpus, it has no corpus.json" in open_error(folder)


def test_empty_folder_is_no_corpus(tmp_path: Path) -> None:
    assert "no finished corpus" in open_error(tmp_path)


def test_file_instead_of_a_folder_is_no_corpus(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    assert "there is no such folder" in open_error(tmp_path / "file")


@pytest.mark.parametrize("array", ["tokens", "document_ends", "chunk_first_document"])
def test_truncated_shard_is_named_with_its_sizes(folder: Path, array: str) -> None:
    shard = folder / "train" / array / "c" / "0"
    size = shard.stat().st_size
    shard.write_bytes(shard.read_bytes()[:-1])
    assert f"{shard} has {size - 1} bytes, not {size}" in open_error(folder)
    Corpus.open(folder, "validation")  # the other split stays usable


def test_missing_shard_is_named(folder: Path) -> None:
    shard = folder / "train/tokens/c/2"
    shard.unlink()
    assert f"{shard} is missing" in open_error(folder)


def test_any_flipped_byte_of_a_token_shard_is_found_when_it_is_read(folder: Path) -> None:
    shard = folder / "train/tokens/c/1"
    whole = shard.read_bytes()
    for place in range(0, len(whole), 3):
        damaged = bytearray(whole)
        damaged[place] ^= 0x10
        shard.write_bytes(damaged)
        corpus = Corpus.open(folder, "train")
        with pytest.raises(CorpusError, match=r"train/tokens: chunk \d+\.\.\d+ .* file c/1\) is damaged") as caught:
            corpus.tokens(0, corpus.num_tokens)
        assert "\n" not in str(caught.value)
    shard.write_bytes(whole)
    np.testing.assert_array_equal(Corpus.open(folder, "train").tokens(0, len(FLAT)), FLAT)


@pytest.mark.parametrize("array", ["document_ends", "chunk_first_document"])
def test_flipped_byte_of_document_offsets_is_found(folder: Path, array: str) -> None:
    shard = folder / "train" / array / "c" / "0"
    damaged = bytearray(shard.read_bytes())
    damaged[9] ^= 1
    shard.write_bytes(damaged)
    assert f"train/{array}: chunk 0" in open_error(folder)


def test_other_version_is_refused(folder: Path) -> None:
    change_json(folder / "corpus.json", format_version=FORMAT_VERSION + 1)
    assert f"version {FORMAT_VERSION + 1}" in open_error(folder)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": "engram-corpus"}'])
def test_damaged_summary_is_one_line(folder: Path, content: str) -> None:
    (folder / "corpus.json").write_text(content)
    assert "metadata" in open_error(folder)


@pytest.mark.parametrize("file", ["zarr.json", "tokens/zarr.json", "document_ends/zarr.json"])
@pytest.mark.parametrize("damage", ["cut", "garbage", "empty", "missing"])
def test_damaged_zarr_metadata_is_one_line(folder: Path, file: str, damage: str) -> None:
    path = folder / "train" / file
    content = path.read_text()
    if damage == "missing":
        path.unlink()
    else:
        path.write_text({"cut": content[: len(content) // 2], "garbage": '{"zarr_format": 3}', "empty": ""}[damage])
    assert f"the metadata of {folder / 'train'} is damaged" in open_error(folder)


def test_changed_counts_and_hashes_are_found(folder: Path) -> None:
    saved = folder.with_name("saved")
    shutil.copytree(folder, saved)
    other_shards = json.loads((folder / "train/tokens/zarr.json").read_text())["attributes"]["shards"]
    other_shards[0]["sha256"] = "0" * 64
    for file, changes, message in (
        ("train/zarr.json", {"num_tokens": len(FLAT) - 1}, "tokens has shape"),
        ("train/zarr.json", {"num_documents": 3}, "document_ends has shape"),
        ("train/zarr.json", {"fingerprint": "0" * 64}, "the fingerprint does not belong"),
        ("train/tokens/zarr.json", {"shards": other_shards}, "the fingerprint does not belong"),
        ("train/tokens/zarr.json", {"shards": other_shards[1:]}, "shards for"),
    ):
        change_json(folder / file, **changes)
        assert message in open_error(folder)
        shutil.rmtree(folder)
        shutil.copytree(saved, folder)
    Corpus.open(folder, "train")


def test_splits_of_different_corpora_are_not_mixed(folder: Path, make_corpus) -> None:
    other = make_corpus(DOCUMENTS[:-1], name="other")
    shutil.rmtree(folder / "train")
    shutil.copytree(other / "train", folder / "train")
    assert "corpus.json" in open_error(folder)


def test_changed_or_missing_tokenizer_is_found(folder: Path) -> None:
    file = folder / "tokenizer.json"
    file.write_bytes(file.read_bytes() + b" ")
    assert f"{file} is not the tokenizer that made the tokens" in open_error(folder)
    file.unlink()
    assert f"cannot read {file}" in open_error(folder)
