"""The rows that batches read, against the hash of the run's own stream."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tiny_run import tiny_config

from engram_data.corpus import Corpus
from engram_data.errors import CorpusError
from engram_megatron.errors import UsageError
from engram_megatron.training.batch_rows import batch_rows
from engram_megatron.training.preflight import hasher_of, stream_of


@pytest.mark.parametrize("cut_at_documents", [True, False])
def test_rows_are_those_of_the_first_batch(tiny_corpus: Path, tmp_path: Path, cut_at_documents: bool) -> None:
    overrides = ("training.global_batch_size=8", f"engram.cut_at_documents={str(cut_at_documents).lower()}")
    config = tiny_config(tiny_corpus, tmp_path / "run", *overrides)
    corpus = Corpus.open(tiny_corpus, "train")
    hasher = hasher_of(config, corpus)
    assert hasher is not None
    batches = stream_of(config, corpus).microbatches(0)
    tokens = np.concatenate([batch.tokens for batch in batches])
    documents = np.concatenate([batch.document_ids for batch in batches]) if cut_at_documents else None
    found = batch_rows(config, corpus)
    assert [rows.num_sequences for rows in found] == [1, 2, 8]
    for rows in found:
        count = rows.num_sequences
        expected = hasher.rows(tokens[:count], None if documents is None else documents[:count])
        assert (rows.num_lookups, rows.num_unique) == (expected.size, len(np.unique(expected)))
        assert (rows.sequence_length, rows.total_rows) == (64, hasher.total_rows)


def test_batch_is_cut_where_the_corpus_ends(tiny_corpus: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny_corpus, tmp_path / "run", "training.global_batch_size=100000")
    corpus = Corpus.open(tiny_corpus, "train")
    assert batch_rows(config, corpus)[-1].num_sequences == (corpus.num_tokens - 1) // 64


def test_mistakes_are_told(tiny_corpus: Path, tmp_path: Path) -> None:
    corpus = Corpus.open(tiny_corpus, "train")
    with pytest.raises(UsageError, match="has no Engram"):
        batch_rows(tiny_config(tiny_corpus, tmp_path / "run", "engram=none"), corpus)
    with pytest.raises(UsageError, match=r"more than model.vocab_size"):
        batch_rows(tiny_config(tiny_corpus, tmp_path / "run", "model.vocab_size=512"), corpus)
    with pytest.raises(CorpusError, match="fewer than one sample"):
        batch_rows(tiny_config(tiny_corpus, tmp_path / "run", "data.sequence_length=1000000"), corpus)
