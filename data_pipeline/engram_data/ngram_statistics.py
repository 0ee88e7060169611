"""How unevenly n-grams of token ids occur: what share of a corpus the most frequent ones make up."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engram_data.corpus import Corpus

TOP = (10, 100, 1_000, 10_000, 100_000, 1_000_000)


@dataclass(frozen=True)
class OrderStatistics:
    """N-grams of one order. `num_once`: distinct ones that occur once; `coverage[k]`: share of all occurrences that the
    k most frequent ones are, for the k of `TOP` that are fewer than the distinct ones."""

    order: int
    num_occurrences: int
    num_distinct: int
    num_once: int
    coverage: dict[int, float]


@dataclass(frozen=True)
class NgramStatistics:
    """Of `num_sampled` tokens in `num_pieces` pieces, evenly spread over the corpus."""

    num_sampled: int
    num_pieces: int
    orders: list[OrderStatistics]


def ngram_statistics(corpus: Corpus, max_tokens: int, max_order: int = 3) -> NgramStatistics:
    """N-grams of orders 1..`max_order` that lie within one document (eos included), in at most `max_tokens` tokens.

    Memory: about 60 bytes for each of `max_tokens`. Raises `CorpusError` for a damaged chunk.
    """
    tokens, texts, num_pieces = _sample(corpus, max_tokens)
    # The code of an n-gram is the rank of its (n - 1)-gram's code and its last token: distinct n-grams, distinct codes.
    codes = np.zeros(len(tokens) + 1, np.int64)
    orders = []
    for order in range(1, max_order + 1):
        if len(tokens) < order:
            break
        keys = codes[:-1] * corpus.tokenizer.vocab_size + tokens[order - 1 :]
        codes = np.unique(keys, return_inverse=True)[1].astype(np.int64)
        within = texts[: len(codes)] == texts[order - 1 :]
        orders.append(_statistics(order, np.bincount(codes[within])))
    return NgramStatistics(len(tokens), num_pieces, orders)


def _sample(corpus: Corpus, max_tokens: int) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
    """(tokens, a number for each that changes where another document or piece starts, pieces)."""
    assert max_tokens > 0, max_tokens
    size = min(corpus.chunk_tokens, max_tokens)
    num_chunks = -(-corpus.num_tokens // corpus.chunk_tokens)
    num_pieces = min(num_chunks, max_tokens // size)
    tokens, starts = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for piece in range(num_pieces):
        start = piece * num_chunks // num_pieces * corpus.chunk_tokens
        stop = min(start + size, corpus.num_tokens)
        begins = np.zeros(stop - start, np.int64)
        ends = corpus.document_ends_between(start, stop)
        begins[ends[ends < stop] - start] = 1
        begins[0] = 1
        tokens.append(corpus.tokens(start, stop).astype(np.int64))
        starts.append(begins)
    return np.concatenate(tokens), np.cumsum(np.concatenate(starts)), num_pieces


def _statistics(order: int, counts: NDArray[np.int64]) -> OrderStatistics:
    ranked = np.sort(counts[counts > 0])[::-1]
    total = int(ranked.sum())
    covered = np.cumsum(ranked)
    coverage = {k: float(covered[k - 1] / total) for k in TOP if k < len(ranked)}
    return OrderStatistics(order, total, len(ranked), int((ranked == 1).sum()), coverage)
