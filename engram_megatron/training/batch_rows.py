"""How many distinct rows of the tables the batches of a run read: what its gather would move for a corpus."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engram_data.corpus import Corpus
from engram_megatron.config import RunConfig
from engram_megatron.errors import UsageError
from engram_megatron.training.preflight import hasher_of, stream_of

MAX_TOKENS = 2**23  # of a global batch; more are not read


@dataclass(frozen=True)
class BatchRows:
    """A part of the first global batch: `num_sequences` of `sequence_length` tokens make `num_lookups` in tables of
    `total_rows`, of `num_unique` distinct rows."""

    num_sequences: int
    sequence_length: int
    num_lookups: int
    num_unique: int
    total_rows: int


def batch_rows(config: RunConfig, corpus: Corpus) -> list[BatchRows]:
    """The rows of one sequence, of the first microbatch and of the first global batch, in the order of the run.

    A global batch of more than `MAX_TOKENS` tokens, or of more windows than the corpus has, is counted as far as that.
    Memory: a byte for each row that is touched, and one microbatch. Raises `UsageError` for a model without Engram or
    with another vocabulary, `CorpusError` where the corpus is shorter than a sample.
    """
    if config.engram is None:
        raise UsageError(f"{config.name} has no Engram, so no rows: choose a preset with Engram")
    hasher = hasher_of(config, corpus)
    assert hasher is not None
    stream = stream_of(config, corpus)
    length = config.data.sequence_length
    most = max(1, min(stream.num_samples, MAX_TOKENS // length))
    samples = [sample for microbatch in stream.samples(0) for sample in microbatch][:most]
    sizes = sorted({min(size, len(samples)) for size in (1, config.training.micro_batch_size, len(samples))})
    seen = np.zeros(hasher.total_rows, np.bool_)  # pages come into memory as they are touched
    found: list[BatchRows] = []
    num_lookups = 0
    for number, sample in enumerate(samples, 1):
        batch = stream.batch([sample])
        rows = hasher.rows(batch.tokens, batch.document_ids if config.engram.cut_at_documents else None)
        seen[rows.reshape(-1)] = True
        num_lookups += rows.size
        if number in sizes:
            found.append(BatchRows(number, length, num_lookups, int(np.count_nonzero(seen)), hasher.total_rows))
    return found
