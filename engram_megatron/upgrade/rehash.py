"""Rows of tables under other primes, carried over along the n-grams of a corpus.

A row is addressed by hash(n-gram) mod prime, and n-grams are not stored, so no row says where it belongs under another
prime. A corpus does: each of its n-grams has a row under both. A new row becomes the mean of the old rows that its
n-grams read, weighted by how often they do; where all of them read one old row, it is that row to the bit. N-grams that
shared an old row and no longer share the new one start equal and part ways in training. A row that no n-gram of the
corpus addresses starts as in a new table.

Shape letters: B sequences, T positions, H heads of a layer, P rows of a head, D row_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram_checkpoints.table_reader import TableReader
from engram_kernels.row_state import RowState
from engram_megatron.hashing.ngram_hasher import NgramHasher
from engram_megatron.tables.row_init import initial_rows
from engram_megatron.tables.table_shard import InitialRows, without_history

Int64 = NDArray[np.int64]
TokenBatch = tuple[NDArray[np.int64], NDArray[np.int32] | None]  # tokens_BT, document_ids_BT


@dataclass
class RehashReport:
    """Counts over all heads: rows, those that an n-gram of the corpus addresses, lookups of the corpus, and those of
    them that read a mean of several old rows."""

    rows: int = 0
    addressed_rows: int = 0
    lookups: int = 0
    mixed_lookups: int = 0


class RehashedHead:
    """One head between two primes. `old_weights` [old P, D], the rows to carry over."""

    def __init__(self, old_weights: NDArray[Any], num_rows: int) -> None:
        self.old_weights = old_weights
        self._sums = np.zeros((num_rows, old_weights.shape[1]))
        self.lookups = np.zeros(num_rows, np.int64)
        self._source = np.full(num_rows, -1, np.int64)  # the first old row that came
        self.is_mixed = np.zeros(num_rows, np.bool_)

    def add(self, old_rows: Int64, new_rows: Int64) -> None:
        """Count lookups: the i-th n-gram reads `old_rows[i]` of the old head and `new_rows[i]` of the new one."""
        pairs, counts = np.unique(new_rows * len(self.old_weights) + old_rows, return_counts=True)
        new, old = np.divmod(pairs, len(self.old_weights))
        starts = np.flatnonzero(np.diff(new, prepend=-1))
        rows, first = new[starts], old[starts]
        several = np.diff(starts, append=new.size) > 1
        seen = self._source[rows] >= 0
        self.is_mixed[rows] |= several | (seen & (self._source[rows] != first))
        self._source[rows] = np.where(seen, self._source[rows], first)
        self.lookups[rows] += np.add.reduceat(counts, starts)
        self._sums[rows] += np.add.reduceat(counts[:, None] * self.old_weights[old].astype(np.float64), starts)

    def weights(self, start: int, stop: int, first_row: int, initial: InitialRows) -> NDArray[Any]:
        """Rows start .. stop - 1 of the new head [stop - start, D]; `first_row` is the row id of its row 0."""
        lookups, source = self.lookups[start:stop], self._source[start:stop]
        is_mixed = self.is_mixed[start:stop]
        out = self.old_weights[source]  # of -1 any row
        out[is_mixed] = self._sums[start:stop][is_mixed] / lookups[is_mixed, None]
        fresh = np.flatnonzero(lookups == 0)
        row_dim = out.shape[1]
        out[fresh] = initial_rows(fresh + start + first_row, row_dim, out.dtype, initial.seed, initial.std)
        return out


class Rehash:
    """The new tables, made a few heads at a time; their rows must be asked for in rising order, once.

    `batches` starts a pass over the corpus, one for each group of heads that fits into `max_bytes` (at least one
    head). `on_pass(done, heads)` is called before each. `report` is complete when all rows were asked for.
    """

    def __init__(
        self,
        reader: TableReader,
        old: NgramHasher,
        new: NgramHasher,
        batches: Callable[[], Iterable[TokenBatch]],
        initial: InitialRows,
        *,
        moments: int,
        max_bytes: int,
        on_pass: Callable[[int, int], None] = lambda _done, _heads: None,
    ) -> None:
        self._reader, self._catch_up = reader, reader.catch_up()
        self._old, self._new, self._batches, self._initial = old, new, batches, initial
        self._moments, self._max_bytes, self._on_pass = moments, max_bytes, on_pass
        self._old_sizes, self._sizes = (hasher.primes_LOJ.reshape(-1).tolist() for hasher in (old, new))
        self._first_rows = new.row_offsets_LH.reshape(-1).tolist()
        self._heads: dict[int, RehashedHead] = {}
        self.report = RehashReport()

    def rows(self, start: int, stop: int) -> RowState:
        """Rows start .. stop - 1 of the joined row space."""
        parts = []
        for head, (first, size) in enumerate(zip(self._first_rows, self._sizes, strict=True)):
            low, high = max(start, first), min(stop, first + size)
            if low < high:
                parts.append(self._head(head).weights(low - first, high - first, first, self._initial))
        return without_history(np.concatenate(parts), self._moments)

    def _head(self, head: int) -> RehashedHead:
        if head not in self._heads:
            self._heads.clear()  # before the next ones are made
            self._on_pass(head, len(self._sizes))
            self._heads = {number: self._empty(number) for number in self._group(head)}
            for ids in self._row_ids():
                for number, made in self._heads.items():
                    made.add(*ids(number))
            for made in self._heads.values():
                self.report.rows += made.lookups.size
                self.report.addressed_rows += int(np.count_nonzero(made.lookups))
                self.report.lookups += int(made.lookups.sum())
                self.report.mixed_lookups += int(made.lookups[made.is_mixed].sum())
        return self._heads[head]

    def _group(self, first: int) -> range:
        """Heads from `first` on that are made in one pass."""
        dim, wide = self._reader.description.row_dim, self._reader.wide.itemsize
        needed = np.cumsum([
            old * dim * wide + new * (8 * dim + 8 + 8 + 1)
            for old, new in zip(self._old_sizes[first:], self._sizes[first:], strict=True)
        ])  # fmt: skip
        return range(first, first + max(1, int(np.searchsorted(needed, self._max_bytes, side="right"))))

    def _empty(self, head: int) -> RehashedHead:
        first = int(self._old.row_offsets_LH.reshape(-1)[head])
        old_weights = np.empty((self._old_sizes[head], self._reader.description.row_dim), self._reader.wide)
        for start, stop in self._reader.pieces(first, first + len(old_weights)):
            old_weights[start - first : stop - first] = self._reader.weights(start, stop, self._catch_up)
        return RehashedHead(old_weights, self._sizes[head])

    def _row_ids(self) -> Iterator[Callable[[int], tuple[Int64, Int64]]]:
        """For each batch, what gives the old and the new rows of a head that its n-grams read, numbered in the head."""
        heads_per_layer = self._new.row_offsets_LH.shape[1]
        for tokens_BT, document_ids_BT in self._batches():
            of_both = [hasher.hashes(tokens_BT, document_ids_BT) for hasher in (self._old, self._new)]

            def of_head(head: int, of_both: list[Int64] = of_both) -> tuple[Int64, Int64]:
                layer, column = divmod(head, heads_per_layer)
                old, new = (rows_LBTH[layer, :, :, column].reshape(-1) for rows_LBTH in of_both)
                return old, new

            yield of_head
