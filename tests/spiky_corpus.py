"""A small corpus on which the loss of a tiny run really spikes: batches of some steps hold words that no other has."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np

from engram_data.corpus import Corpus
from engram_data.order import samples_of
from engram_data.tokenizer import CorpusTokenizer
from engram_data.writer import CorpusWriter

SEED, LENGTH, BATCH = 1234, 64, 4  # of engram_tiny as `tiny_run.TINY` has it


def build_spiky_corpus(source: Path, out: Path, num_samples: int, spiky_steps: Collection[int]) -> Path:
    """Corpus `out` of the first `num_samples` samples of `source`, with common words (ids in the lower half) for rare
    ones; but for the batches of `spiky_steps` (0-based), which hold rare words only."""
    corpus = Corpus.open(source, "train")
    chance = np.random.default_rng(7)
    half = corpus.tokenizer.vocab_size // 2
    eos = corpus.tokenizer.eos_token_id
    tokens = corpus.tokens(0, num_samples * LENGTH + 1).astype(np.int64)
    words = tokens != eos
    tokens[words & (tokens >= half)] %= half
    tokens[words & (tokens == eos)] += 1
    for step in spiky_steps:
        for sample in samples_of(SEED, step * BATCH + np.arange(BATCH), num_samples, 1 << 16):
            window = slice(sample * LENGTH + 1, (sample + 1) * LENGTH)
            tokens[window] = np.where(words[window], chance.integers(half, 2 * half, LENGTH - 1), eos)
    tokens[-1] = eos
    validation = Corpus.open(source, "validation")
    tokenizer = CorpusTokenizer("tiny", corpus.tokenizer_file.read_bytes())
    with CorpusWriter(out, tokenizer) as writer:
        for document in np.split(tokens, np.flatnonzero(tokens == eos)[:-1] + 1):
            writer.add(document[:-1], "train")
        writer.add(validation.tokens(0, 16 * LENGTH), "validation")
        writer.finish({"made": {"documents": 1, "text_bytes": 0}}, 0.0)
    return out


def samples_by_content(corpus: Path) -> dict[bytes, int]:
    """The number of each training sample by its tokens, as int64, of which no two are the same."""
    train = Corpus.open(corpus, "train")
    count = (train.num_tokens - 1) // LENGTH
    windows = [train.tokens(number * LENGTH, (number + 1) * LENGTH + 1) for number in range(count)]
    found = {window.astype(np.int64).tobytes(): number for number, window in enumerate(windows)}
    assert len(found) == count, "samples that cannot be told apart"
    return found
