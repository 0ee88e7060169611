"""What ranks in network namespaces do for tests/gather/test_against_dense_adam.py."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from dense_adam_case import Step, case_tables, history_of
from namespaces import bytes_sent
from sharded_tables import Tables, sharded_tables

from engram_megatron.gather.lookup import RowLookup
from engram_megatron.gather.transport import CheckedTransport, GlooTransport


class Sent(NamedTuple):
    """By a rank: bytes of ids, rows and gradients as its statistics count them, and all that left its namespace."""

    counted: float
    crossed: int


def train_tables(rank: int, num_ranks: int) -> tuple[list[Step], Sent]:
    """The steps of `dense_adam_case`, every rank a node of its own; then a batch so large that its messages outweigh
    everything else on the wire."""
    lookup, adam = sharded_tables(case_tables("float64"), rank, num_ranks)
    rail = lookup.groups.rail
    assert isinstance(rail, CheckedTransport)
    assert isinstance(rail.inner, GlooTransport)
    history = history_of(lookup, adam, rank)
    large, _ = sharded_tables(Tables(rows=40_000, row_dim=32), rank, num_ranks)
    return history, _send(large, rank)


def _send(lookup: RowLookup, rank: int) -> Sent:
    before = bytes_sent()
    rows = lookup.read(np.random.default_rng(rank).integers(0, lookup.layout.total_rows, (1, 100_000)))
    rows.expand().sum().backward()
    lookup.return_gradients(rows)
    scalars = rows.statistics.scalars()
    counted = sum(scalars[f"gather/{what}_bytes_sent"] for what in ("id", "row", "gradient"))
    return Sent(counted, bytes_sent() - before)
