"""Writing a corpus: splits, fingerprints, all or nothing, flat memory; and the reading of text."""

from __future__ import annotations

import gzip
import json
import lzma
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import zarr

from engram_data.build import build_corpus
from engram_data.corpus import Corpus
from engram_data.corpus_format import ArraySizes
from engram_data.documents import split_of
from engram_data.errors import CorpusError
from engram_data.shard_writer import ShardedArrayWriter
from engram_data.text_source import Rejection, find_text_files, read_documents
from engram_data.tokenizer import CorpusTokenizer
from engram_data.writer import CorpusWriter


def write_lines(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def build(sources: list[Path], out: Path, tokenizer: CorpusTokenizer, fraction: float = 0.0) -> Path:
    build_corpus([str(source) for source in sources], out, tokenizer, fraction, lambda progress: None)
    return out


def documents_of(folder: Path, split: str, tokenizer: CorpusTokenizer) -> list[str]:
    corpus = Corpus.open(folder, split)
    tokens = corpus.tokens(0, corpus.num_tokens)
    starts = [0, *corpus.document_ends[:-1]] if corpus.num_documents else []
    assert all(tokens[end - 1] == tokenizer.identity.eos_token_id for end in corpus.document_ends)
    return [tokenizer.decode(tokens[a : b - 1].tolist()) for a, b in zip(starts, corpus.document_ends, strict=True)]


def read(sources: list[Path]) -> tuple[list[str], list[Rejection]]:
    rejections: list[Rejection] = []
    files = find_text_files([str(source) for source in sources])
    return [document.text for document in read_documents(files, rejections.append)], rejections


def test_built_corpus_decodes_to_the_text(tmp_path: Path, addresses: list[str], tokenizer: CorpusTokenizer) -> None:
    texts = [*addresses, "é🙂\u2028 \r\n\ttabs", "a <|endoftext|> inside"]
    out = build([write_lines(tmp_path / "a.jsonl", texts)], tmp_path / "out", tokenizer)
    assert documents_of(out, "train", tokenizer) == texts


def test_split_is_by_text_alone(tmp_path: Path, addresses: list[str], tokenizer: CorpusTokenizer) -> None:
    out = build([write_lines(tmp_path / "a.jsonl", addresses)], tmp_path / "a", tokenizer, 0.4)
    backwards = build([write_lines(tmp_path / "b.jsonl", addresses[::-1])], tmp_path / "b", tokenizer, 0.4)
    for split in ("train", "validation"):
        documents = documents_of(out, split, tokenizer)
        assert documents == documents_of(backwards, split, tokenizer)[::-1]
        assert documents == [text for text in addresses if split_of(text.encode(), 0.4) == split]
        assert documents


def test_held_out_fraction_is_met_and_nested() -> None:
    texts = [f"document {i}" for i in range(20000)]
    held_out = {f: {text for text in texts if split_of(text.encode(), f) == "validation"} for f in (0.0, 0.05, 0.3)}
    assert not held_out[0.0]
    # A binomial of 20,000: 4 standard deviations are 0.0062 and 0.013.
    assert abs(len(held_out[0.05]) / 20000 - 0.05) < 0.0062
    assert abs(len(held_out[0.3]) / 20000 - 0.3) < 0.013
    assert held_out[0.05] < held_out[0.3]


def test_fingerprint_is_of_the_content(tmp_path: Path, make_corpus, tokenizer: CorpusTokenizer) -> None:
    documents = [[5, 6, 7], [8, 9], list(range(3, 90))]
    same = {Corpus.open(make_corpus(documents, name=name), "train").fingerprint for name in ("a", "b")}
    assert len(same) == 1
    variants = {
        "order": [[8, 9], [5, 6, 7], list(range(3, 90))],
        "token": [[5, 6, 8], [8, 9], list(range(3, 90))],
        "border": [[5, 6, 7, 1, 8, 9], list(range(3, 90))],  # the same tokens, the eos of one document inside
        "less": documents[:2],
    }
    others = {Corpus.open(make_corpus(d, name=name), "train").fingerprint for name, d in variants.items()}
    assert len(others | same) == 5
    spaced = CorpusTokenizer("small", tokenizer.json_bytes + b"\n")
    with CorpusWriter(tmp_path / "t", spaced, ArraySizes(16, 64)) as writer:
        for document in documents:
            writer.add(document, "train")
        summary = writer.finish({}, 0.0)["train"]
    assert summary.fingerprint not in same


def test_existing_out_is_refused_and_kept(make_corpus, tokenizer: CorpusTokenizer) -> None:
    folder = make_corpus([[5, 6, 7]])
    with pytest.raises(CorpusError, match="exists: choose another folder"), CorpusWriter(folder, tokenizer):
        pass
    assert Corpus.open(folder, "train").num_tokens == 4


def test_partial_of_another_build_is_refused_and_kept(tmp_path: Path, tokenizer: CorpusTokenizer) -> None:
    (tmp_path / "out.partial").mkdir()
    with pytest.raises(CorpusError, match="another build is writing it"), CorpusWriter(tmp_path / "out", tokenizer):
        pass
    assert (tmp_path / "out.partial").exists()


def test_failed_build_leaves_nothing(tmp_path: Path, tokenizer: CorpusTokenizer) -> None:
    def write(out: str, last: int, stop: type[BaseException] | None = None) -> None:
        with CorpusWriter(tmp_path / out, tokenizer, ArraySizes(16, 64)) as writer:
            writer.add(list(range(200)), "train")
            writer.add([5, last], "train")
            assert (tmp_path / f"{out}.partial/train/tokens/c/2").exists()
            if stop is not None:
                raise stop

    with pytest.raises(CorpusError, match=r"token ids 5\.\.512 are not in 0\.\.511"):
        write("new/deep/out", 512)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(KeyboardInterrupt):
        write("out", 511, KeyboardInterrupt)
    assert list(tmp_path.iterdir()) == []


def test_unfinished_writer_is_no_corpus(tmp_path: Path, tokenizer: CorpusTokenizer) -> None:
    with CorpusWriter(tmp_path / "out", tokenizer) as writer:
        writer.add([5, 6], "train")
        with pytest.raises(CorpusError, match="no finished corpus"):
            Corpus.open(tmp_path / "out.partial", "train")
    assert list(tmp_path.iterdir()) == []


def test_memory_of_the_writer_does_not_grow_with_the_array(tmp_path: Path) -> None:
    sizes = ArraySizes(2**12, 2**18)
    peaks = []
    block = np.arange(10_000, dtype=np.uint32)
    for name, blocks in (("small", 10), ("large", 200)):
        zarr.create_group(tmp_path / name, zarr_format=3)
        writer = ShardedArrayWriter(tmp_path / name, "tokens", np.dtype(np.uint32), sizes)
        tracemalloc.start()
        for _ in range(blocks):
            writer.append(block)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        writer.close()
    # 2,000,000 tokens are 8 MB; the writer holds one chunk of 16 KB and a few copies of it.
    assert peaks[1] < 1.2 * peaks[0] + 16_384
    assert peaks[1] < 400_000
    np.testing.assert_array_equal(zarr.open_group(tmp_path / "large")["tokens"][:], np.tile(block, 200))


def test_all_kinds_of_files_are_read_in_sorted_order(tmp_path: Path) -> None:
    line = b'{"id": 1, "text": "%s"}\n'
    (tmp_path / "sub").mkdir()
    (tmp_path / "d.jsonl").write_bytes(b"\xef\xbb\xbf" + line % b"four" + b"\n" + line % b"five")
    (tmp_path / "b.jsonl.xz").write_bytes(lzma.compress(line % b"two"))
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(line % b"three"))
    (tmp_path / "a.txt").write_text("one\nand its second line")
    (tmp_path / "sub/a.txt.xz").write_bytes(lzma.compress(b"six"))
    (tmp_path / "sub/b.txt.gz").write_bytes(gzip.compress(b"seven"))
    (tmp_path / "ignored.csv").write_text("x")
    expected = ["one\nand its second line", "two", "three", "four", "five", "six", "seven"]
    assert read([tmp_path]) == (expected, [])
    assert read([tmp_path / "sub", tmp_path / "a.txt"])[0] == ["six", "seven", expected[0]]


def test_bad_lines_are_rejected_with_their_place(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    bad = {
        1: (b"{", "invalid JSON"),
        2: (b'{"txt": "a", "id": 7}', "no field `text`"),
        4: (b'{"text": "\xff"}', "invalid UTF-8 at byte 10"),
        5: (b'{"text": 3}', "not a string"),
        6: (b'{"text": "\\ud800"}', "surrogate"),
        7: (b'["text"]', "not an object but a list"),
        8: (b'{"text": ""}', "empty"),
        9: (b"[" * 100_000, "invalid JSON"),
    }
    lines = [bad.get(number, (b'{"text": "good"}', ""))[0] for number in range(1, 11)]
    path.write_bytes(b"\n".join(lines))
    (tmp_path / "b.txt").write_bytes(b"fine\n\xff")
    (tmp_path / "c.txt").write_bytes(b"")
    texts, rejections = read([tmp_path])
    assert texts == ["good", "good"]
    assert [(r.file, r.line) for r in rejections[:8]] == [(str(path), number) for number in bad]
    for rejection, (_, reason) in zip(rejections, bad.values(), strict=False):
        assert reason in rejection.reason
    assert rejections[1].id == "7"
    assert [(r.line, r.reason[:16]) for r in rejections[8:]] == [(2, "invalid UTF-8 at"), (1, "the file is empt")]


def test_rejected_lines_are_listed_beside_the_corpus(tmp_path: Path, tokenizer: CorpusTokenizer) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\njunk\n{"text": "good too"}\n')
    out = build([tmp_path / "a.jsonl"], tmp_path / "out", tokenizer)
    assert documents_of(out, "train", tokenizer) == ["good", "good too"]
    (rejected,) = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    assert (rejected["file"], rejected["line"]) == (str(tmp_path / "a.jsonl"), 2)
    assert json.loads((out / "corpus.json").read_text())["num_rejected"] == 1


def test_text_without_any_document_is_refused(tmp_path: Path, tokenizer: CorpusTokenizer) -> None:
    (tmp_path / "a.jsonl").write_text("junk\nmore junk\n")
    with pytest.raises(CorpusError, match=r"all 2 lines were rejected, the first \(.*a.jsonl:1\) for: invalid JSON"):
        build([tmp_path / "a.jsonl"], tmp_path / "out", tokenizer)
    (tmp_path / "b.jsonl").write_text("\n\n")
    with pytest.raises(CorpusError, match="the files are empty"):
        build([tmp_path / "b.jsonl"], tmp_path / "out", tokenizer)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl"]


def test_unusable_sources_are_named(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("1")
    (tmp_path / "cut.jsonl.xz").write_bytes(lzma.compress(b'{"text": "a"}\n' * 1000)[:-20])
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(b"abc" * 1000)[:-9])
    (tmp_path / "not.jsonl.gz").write_bytes(b"plain")
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("nothing.txt", "no such file"),
        ("x.csv", "neither .jsonl nor .txt"),
        ("empty", "there is no .jsonl or .txt"),
        ("cut.jsonl.xz", "cannot be decompressed"),
        ("cut.txt.gz", "cannot be decompressed"),
        ("not.jsonl.gz", "cannot be decompressed"),
    ):
        with pytest.raises(CorpusError, match=message) as caught:
            read([tmp_path / name])
        assert name in str(caught.value)
    with pytest.raises(CorpusError, match="given twice"):
        find_text_files([str(tmp_path / "not.jsonl.gz"), str(tmp_path)])


@pytest.mark.parametrize("fraction", [-0.1, 1.0, 5.0])
def test_impossible_validation_fraction_is_refused(tmp_path: Path, tokenizer: CorpusTokenizer, fraction: float) -> None:
    with pytest.raises(CorpusError, match="must lie in 0 <= fraction < 1"):
        build([tmp_path], tmp_path / "out", tokenizer, fraction)
