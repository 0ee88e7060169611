"""Batches: the right tokens, the same for any number of ranks and after any resume."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from engram_data.batch import Batch
from engram_data.corpus import Corpus
from engram_data.corpus_format import ArraySizes
from engram_data.errors import CorpusError
from engram_data.stream import TokenStream

RNG = np.random.default_rng(1)
DOCUMENTS = [RNG.integers(3, 512, size).tolist() for size in RNG.integers(0, 40, 80)]
TOKENS = [token for document in DOCUMENTS for token in [*document, 1]]
OWNER = [number for number, document in enumerate(DOCUMENTS) for _ in range(len(document) + 1)]
LENGTH = 8


@pytest.fixture
def folder(make_corpus) -> Path:
    return make_corpus(DOCUMENTS, [[7] * 7])


def stream_of(folder: Path, rank: int = 0, ranks: int = 1, micro: int = 2, **changes) -> TokenStream:
    options = {"sequence_length": LENGTH, "global_batch_size": 24, "seed": 3, **changes}
    return TokenStream(
        Corpus.open(folder, "train"), micro_batch_size=micro, data_rank=rank, data_ranks=ranks, **options
    )


def assert_equal(first: Batch, second: Batch) -> None:
    for name in ("tokens", "labels", "loss_mask", "document_ids"):
        a, b = getattr(first, name), getattr(second, name)
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b, err_msg=name)


@pytest.mark.parametrize("separate", [True, False])
def test_batches_equal_a_slow_reference(folder: Path, separate: bool) -> None:
    stream = stream_of(folder, separate_documents=separate)
    seen = Counter()
    for step in range(20):
        for batch, samples in zip(stream.microbatches(step), stream.samples(step), strict=True):
            assert (batch.tokens.dtype, batch.labels.dtype) == (np.int64, np.int64)
            assert (batch.loss_mask.dtype, batch.document_ids.dtype) == (np.bool_, np.int32)
            for row, sample in enumerate(samples):
                places = range(sample * LENGTH, (sample + 1) * LENGTH)
                assert batch.tokens[row].tolist() == [TOKENS[p] for p in places]
                assert batch.labels[row].tolist() == [TOKENS[p + 1] for p in places]
                # No document is empty (each has its eos), so owners rise by exactly one at every start.
                assert batch.document_ids[row].tolist() == [OWNER[p] - OWNER[places[0]] for p in places]
                same = [OWNER[p + 1] == OWNER[p] for p in places]
                assert batch.loss_mask[row].tolist() == (same if separate else [True] * LENGTH)
                seen.update(same)
    assert seen[True] > 100
    assert seen[False] > 100


def test_an_epoch_predicts_every_token_once(folder: Path) -> None:
    stream = stream_of(folder, global_batch_size=1, micro=1)
    predicted = Counter()
    for step in range(stream.num_samples, 2 * stream.num_samples):  # the second epoch
        ((sample,),) = stream.samples(step)
        predicted.update(range(sample * LENGTH + 1, (sample + 1) * LENGTH + 1))
    assert stream.num_samples == (len(TOKENS) - 1) // LENGTH
    assert predicted == Counter(range(1, stream.num_samples * LENGTH + 1))


@pytest.mark.parametrize(("ranks", "micro"), [(2, 2), (3, 2), (4, 1), (8, 3), (12, 2), (24, 1), (1, 24), (1, 1)])
def test_global_batch_is_the_same_for_any_ranks_and_microbatches(folder: Path, ranks: int, micro: int) -> None:
    whole = stream_of(folder, micro=24)
    parts = [stream_of(folder, rank, ranks, micro) for rank in range(ranks)]
    for step in (0, 1, 5, 1000):
        (expected,) = whole.microbatches(step)
        by_rank = [part.microbatches(step) for part in parts]
        assert {len(batches) for batches in by_rank} == {24 // ranks // micro}
        in_order = [batch for microbatch in zip(*by_rank, strict=True) for batch in microbatch]
        for name in ("tokens", "labels", "loss_mask", "document_ids"):
            rows = np.concatenate([getattr(batch, name) for batch in in_order])
            np.testing.assert_array_equal(rows, getattr(expected, name))


def test_resume_at_any_step_gives_the_same_batches(folder: Path) -> None:
    run = stream_of(folder, 1, 3)
    unbroken = [run.microbatches(step) for step in range(12)]
    for start in (0, 5, 11):
        resumed = stream_of(folder, 1, 3)
        for step in range(start, 12):
            for first, second in zip(unbroken[step], resumed.microbatches(step), strict=True):
                assert_equal(first, second)


def test_seeds_and_steps_give_different_samples(folder: Path) -> None:
    seen = {str(stream_of(folder, seed=seed).samples(step)) for seed in range(4) for step in range(4)}
    assert len(seen) == 16


def test_samples_longer_than_a_chunk_are_read_whole(folder: Path) -> None:
    stream = stream_of(folder, sequence_length=100, global_batch_size=2)
    ((first, second),) = stream.samples(0)
    (batch,) = stream.microbatches(0)
    assert batch.tokens.tolist() == [TOKENS[100 * first : 100 * first + 100], TOKENS[100 * second : 100 * second + 100]]


def test_corpus_shorter_than_a_sample_is_refused(folder: Path) -> None:
    options = {"global_batch_size": 1, "micro_batch_size": 1, "data_rank": 0, "data_ranks": 1, "seed": 0}
    corpus = Corpus.open(folder, "validation")
    with pytest.raises(CorpusError, match=r"validation has 8 tokens, fewer than one sample of .* = 9"):
        TokenStream(corpus, sequence_length=8, **options)
    assert TokenStream(corpus, sequence_length=7, **options).num_samples == 1


def test_batch_that_does_not_divide_is_refused(folder: Path) -> None:
    with pytest.raises(CorpusError, match=r"24 is not divisible by .* = 5 \* 2 = 10"):
        stream_of(folder, 0, 2, micro=5)


def test_damage_met_while_streaming_names_the_chunk(folder: Path) -> None:
    shard = folder / "train/tokens/c/3"
    damaged = bytearray(shard.read_bytes())
    damaged[4] ^= 1
    shard.write_bytes(damaged)
    stream = stream_of(folder)
    with pytest.raises(CorpusError, match=r"train/tokens: chunk 12\.\.12 .* file c/3\) is damaged"):
        [stream.microbatches(step) for step in range(20)]


def test_cached_sample_is_cheap(make_corpus) -> None:
    documents = [RNG.integers(3, 512, 700).tolist() for _ in range(300)]
    stream = stream_of(
        make_corpus(documents, name="large", sizes=ArraySizes(2**16, 2**26)),
        micro=1,
        sequence_length=4096,
        global_batch_size=1,
    )
    times = []
    for step in range(4 * stream.num_samples):
        started = time.perf_counter()
        stream.microbatches(step)
        times.append(time.perf_counter() - started)
    # About 0.25 ms on a shared core, order included (alone, in a batch of 16: 0.05 ms); decoding a chunk takes 2 ms.
    assert np.median(times[stream.num_samples :]) < 1e-3
