"""Rows carried over to other primes are what the definition says, n-gram by n-gram."""

from __future__ import annotations

from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from saved_tables import save_tables

from engram_checkpoints.table_reader import TableReader
from engram_kernels import reference
from engram_kernels.catch_up import CatchUp
from engram_megatron.hashing.ngram_hasher import NgramHasher
from engram_megatron.hashing.vocab_projection import identity_projection
from engram_megatron.optimizer.row_adam import RowAdam
from engram_megatron.tables.row_gradients import RowGradients
from engram_megatron.tables.row_init import fill_initial_rows
from engram_megatron.tables.row_layout import RowLayout
from engram_megatron.tables.table_shard import InitialRows, TableShard
from engram_megatron.upgrade.rehash import Rehash

VOCAB, DIM, BLOCK_ROWS = 40, 6, 64
INITIAL = InitialRows(seed=9, std=0.5)


def _hasher(rows_per_head: int) -> NgramHasher:
    return NgramHasher(
        projection=identity_projection(VOCAB),
        rows_per_head=(rows_per_head, rows_per_head),
        num_heads_per_order=2,
        hash_seed_ids=(2, 3),
        layer_numbers=(2, 3),
        hash_seed=0,
        pad_token_id=1,
    )


def _batches() -> list[tuple[np.ndarray, np.ndarray]]:
    generator = np.random.default_rng(0)
    tokens = np.minimum(generator.geometric(0.15, (3, 4, 25)), VOCAB - 1)
    documents = np.cumsum(generator.random((3, 4, 25)) < 0.1, axis=-1, dtype=np.int32)
    return list(zip(tokens, documents, strict=True))


def _rows(hasher: NgramHasher, tokens: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """Of the reference, [L, B, T, H]."""
    return reference.ngram_hash(
        tokens, documents, hasher.multipliers_LN, hasher.primes_LOJ, hasher.row_offsets_LH, hasher.pad_id
    )


@pytest.mark.parametrize(
    ("new_rows", "heads_at_once", "num_passes"), [(29, 3, {3, 4}), (101, 0, {8}), (601, 3, {3, 4}), (601, 100, {1})]
)
def test_rows_are_the_weighted_means_of_what_their_ngrams_read(
    tmp_path: Path, new_rows: int, heads_at_once: int, num_passes: set[int]
) -> None:
    old, new = _hasher(53), _hasher(new_rows)
    adam = RowAdam(TableShard(RowLayout(old.total_rows, BLOCK_ROWS, 1), 0, DIM), CatchUp(0.9, 0.95, 1e-20))
    adam.shard.initialize(seed=3, std=1.0)
    for step in range(3):  # rows that are behind must be carried over as of the last step
        used = np.arange(step, old.total_rows, 3 + step)
        adam.step(RowGradients.summed(used, [np.ones((used.size, DIM), np.float32)]), lr=0.1)
    weights = adam.shard.finished(adam.read_as_of)

    sources: dict[int, Counter[int]] = defaultdict(Counter)
    for tokens, documents in _batches():
        before, after = (_rows(hasher, tokens, documents).reshape(-1).tolist() for hasher in (old, new))
        for old_row, new_row in zip(before, after, strict=True):
            sources[new_row][old_row] += 1
    expected = np.empty((new.total_rows, DIM), np.float32)
    fill_initial_rows(expected, 0, INITIAL.seed, INITIAL.std)
    for new_row, counts in sources.items():
        lookups = sum(counts.values())
        total = sum(count * weights[row].astype(np.float64) for row, count in counts.items())
        expected[new_row] = weights[next(iter(counts))] if len(counts) == 1 else total / lookups

    reader = TableReader(save_tables(tmp_path / "tables.zarr", adam))
    passes: list[int] = []
    head_bytes = int(old.primes_LOJ.max()) * DIM * 4 + int(new.primes_LOJ.max()) * (DIM * 8 + 17)
    rehash = Rehash(
        reader,
        old,
        new,
        _batches,
        INITIAL,
        moments=2,
        max_bytes=heads_at_once * head_bytes,
        on_pass=lambda done, _: passes.append(done),
    )
    edges = [*range(0, new.total_rows, BLOCK_ROWS), new.total_rows]
    blocks = [rehash.rows(start, stop) for start, stop in pairwise(edges)]
    assert len(passes) in num_passes
    assert not any(block.state.any() or block.last_step.any() for block in blocks)
    found = np.concatenate([block.weight for block in blocks])
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-7)
    exact = [row for row in range(new.total_rows) if len(sources[row]) < 2]
    assert len(exact) > 10
    np.testing.assert_array_equal(found[exact], expected[exact], strict=True)
    mixed = sum(sum(counts.values()) for counts in sources.values() if len(counts) > 1)
    addressed = sum(1 for counts in sources.values() if counts)
    report = rehash.report
    assert (report.rows, report.lookups) == (new.total_rows, 3 * 4 * 25 * 8)
    assert (report.addressed_rows, report.mixed_lookups) == (addressed, mixed)
