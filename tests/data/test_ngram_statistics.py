"""Counts of n-grams against counting by hand; samples of texts."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from engram_data.corpus import Corpus
from engram_data.corpus_report import corpus_report, sample_texts
from engram_data.ngram_statistics import TOP, ngram_statistics

RANDOM = np.random.default_rng(7)
DOCUMENTS = [RANDOM.integers(2, 40, n).tolist() for n in (5, 40, 0, 300, 16, 1, 15, 200)]
EOS = 1


def test_counts_are_those_of_all_ngrams_within_documents(make_corpus) -> None:
    corpus = Corpus.open(make_corpus(DOCUMENTS), "train")
    found = ngram_statistics(corpus, 2**20)
    assert found.num_sampled == corpus.num_tokens
    # Pieces are joined where they follow one another, but an n-gram is counted within a piece alone.
    for statistics in found.orders:
        order, counts = statistics.order, Counter()
        stream = [(token, number) for number, document in enumerate(DOCUMENTS) for token in [*document, EOS]]
        for start in range(0, len(stream), 16):
            piece = stream[start : start + 16]
            for i in range(len(piece) - order + 1):
                window = piece[i : i + order]
                if window[0][1] == window[-1][1]:
                    counts[tuple(token for token, _ in window)] += 1
        assert statistics.num_occurrences == counts.total()
        assert statistics.num_distinct == len(counts)
        assert statistics.num_once == sum(count == 1 for count in counts.values())
        top = {k: sum(count for _, count in counts.most_common(k)) / counts.total() for k in TOP if k < len(counts)}
        assert statistics.coverage == pytest.approx(top)


def test_sample_is_bounded_and_spread(make_corpus) -> None:
    documents = [[number] * 15 for number in range(2, 42)]  # with eos one chunk each
    corpus = Corpus.open(make_corpus(documents), "train")
    found = ngram_statistics(corpus, 64, max_order=1)
    assert (found.num_sampled, found.num_pieces) == (64, 4)
    assert found.orders[0].num_distinct == 5  # of four documents, and eos
    assert ngram_statistics(corpus, 5).num_sampled == 5


def test_empty_split_has_no_ngrams(make_corpus) -> None:
    corpus = Corpus.open(make_corpus(DOCUMENTS), "validation")
    assert ngram_statistics(corpus, 100).orders == []
    assert sample_texts(corpus, 3) == []


def test_report_and_samples(make_corpus, tokenizer, addresses: list[str]) -> None:
    texts = ["Short.", *addresses[:3]]
    folder = make_corpus([ids.tolist() for ids in tokenizer.encode_batch(texts)])
    report = corpus_report(folder)
    split = report["splits"]["train"]
    corpus = Corpus.open(folder, "train")
    assert (split["documents"], split["tokens"]) == (4, corpus.num_tokens)
    assert split["fingerprint"] == corpus.fingerprint
    assert split["bytes"] == sum(file.stat().st_size for file in (folder / "train").rglob("*") if file.is_file())
    assert report["splits"]["validation"]["bytes_per_token"] is None
    samples = sample_texts(corpus, 2)
    assert [sample["document"] for sample in samples] == [0, 2]
    assert (samples[0]["text"], samples[0]["is_cut"]) == ("Short.<|endoftext|>", False)
    assert samples[1]["is_cut"]
    assert texts[2].startswith(samples[1]["text"])
    assert [corpus.document_range(i)[1] for i in range(4)] == corpus.document_ends.tolist()
    assert [sample["document"] for sample in sample_texts(corpus, 9)] == [0, 1, 2, 3]
