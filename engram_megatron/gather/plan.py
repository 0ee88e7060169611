"""What a rank has to ask for, and what its node asks of the others: each distinct row once.

Two steps. A rank finds the distinct rows of its batch (`make_plan`). For every rail, one rank of the node merges what
all its ranks ask for on that rail (`merge_requests`): that list goes to the nodes that own the rows. See `topology` for
rails.

A row belongs to the *wave* in which it is needed first. Shape letters: U distinct rows of a rank's batch, M of a node
on one rail, R rows that other nodes ask of a rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram_kernels.unique_rows import unique_rows
from engram_megatron.tables.row_layout import RowLayout

Int64 = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class GatherPlan:
    """The distinct rows behind an array of row ids.

    `unique_rows` int64 [U], sorted by rail, node and row id of the owner; `waves` int64 [U], in which each is needed
    first; `rail_counts` int64 [ranks per node], how many of them each rail has; `inverse` int64 with the shape of the
    ids, `unique_rows[inverse] == ids`.
    """

    unique_rows: Int64
    waves: Int64
    rail_counts: Int64
    inverse: Int64

    def of_rail(self, rail: int) -> slice:
        """The places of a rail's rows."""
        start = int(self.rail_counts[:rail].sum())
        return slice(start, start + int(self.rail_counts[rail]))


def make_plan(ids: Int64, layout: RowLayout, num_waves: int = 1) -> GatherPlan:
    """Plan the gather of `ids` (int64 row ids, any shape, may be empty).

    With several waves the first dimension of `ids` is that of microbatches: microbatch i belongs to wave i, those from
    `num_waves` - 1 on to the last.
    """
    assert ids.dtype == np.int64, ids.dtype
    rows, inverse = unique_rows(np.ascontiguousarray(ids).reshape(-1))
    assert rows.size == 0 or (rows[0] >= 0 and rows[-1] < layout.total_rows), (rows[0], rows[-1], layout)
    node, rail = np.divmod(layout.owner(rows), layout.shards_per_node)
    order = _order_of_groups(rail * layout.num_nodes + node, layout.num_shards)  # rows stay rising within an owner
    place = np.empty_like(order)
    place[order] = np.arange(rows.size)
    inverse = place[inverse].reshape(ids.shape)
    waves = np.full(rows.size, num_waves - 1, np.int64)
    for wave in reversed(range(num_waves - 1)):
        waves[inverse[wave : wave + 1].reshape(-1)] = wave  # the first wave writes last
    counts = np.bincount(rail, minlength=layout.shards_per_node).astype(np.int64)
    return GatherPlan(rows[order], waves, counts, inverse)


def hottest_lookups(plan: GatherPlan) -> int:
    """Lookups of the hundredth of the distinct rows that have most of them."""
    lookups = np.bincount(plan.inverse.reshape(-1), minlength=1)
    # Few numbers occur, and often: counting them is many times faster than any sort of them.
    rows_with = np.bincount(lookups)
    hottest = np.minimum(np.cumsum(rows_with[::-1]), -(-lookups.size // 100))
    return int(np.diff(hottest, prepend=0) @ np.arange(rows_with.size)[::-1])


def _order_of_groups(groups: Int64, num_groups: int) -> Int64:
    """The stable order that sorts `groups`, numbers below `num_groups`; numpy counts those of 16 bits."""
    small = groups.astype(np.uint16) if num_groups <= 2**16 else groups
    return np.argsort(small, kind="stable")


@dataclass(frozen=True, eq=False)
class NodeRequests:
    """What the ranks of a node ask for on one rail, each row once.

    `rows` int64 [M], sorted by owning node, wave, row id; `counts` int64 [num_nodes, num_waves], how many of them; for
    each rank of the node, in turn, `places` int64 [rows it asks for]: where they stand in `rows`.
    """

    rows: Int64
    counts: Int64
    places: list[Int64]

    def of_node(self, node: int) -> slice:
        """The rows that `node` owns."""
        start = int(self.counts[:node].sum())
        return slice(start, start + int(self.counts[node].sum()))

    def arrivals(self, node: int) -> Int64:
        """Where each of `rows` stands among those that come from other nodes than `node`, which come wave by wave and,
        within a wave, node by node; int64 [M], -1 for the node's own."""
        counts = self.counts.copy()
        counts[node] = 0
        before = np.zeros(counts.size, np.int64)
        before[1:] = np.cumsum(counts.T.reshape(-1))[:-1]  # in order of arrival
        starts = before.reshape(counts.T.shape).T.reshape(-1)
        sizes = self.counts.reshape(-1)
        within = np.arange(self.rows.size) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        arrivals = np.repeat(starts, sizes) + within
        arrivals[self.of_node(node)] = -1
        return arrivals


def merge_requests(rows: Sequence[Int64], waves: Sequence[Int64], layout: RowLayout, num_waves: int) -> NodeRequests:
    """Merge the requests of a node's ranks on one rail: `rows[s]` with their `waves[s]` are those of its s-th rank."""
    distinct, inverse = unique_rows(np.concatenate(rows))
    first_wave = np.full(distinct.size, num_waves - 1, np.int64)
    np.minimum.at(first_wave, inverse, np.concatenate(waves))
    group = layout.owner(distinct) // layout.shards_per_node * num_waves + first_wave
    order = _order_of_groups(group, layout.num_nodes * num_waves)
    place = np.empty_like(order)
    place[order] = np.arange(order.size)
    counts = np.bincount(group, minlength=layout.num_nodes * num_waves).astype(np.int64)
    ends = np.cumsum([part.size for part in rows])[:-1]
    return NodeRequests(distinct[order], counts.reshape(layout.num_nodes, num_waves), np.split(place[inverse], ends))


@dataclass(frozen=True, eq=False)
class Route:
    """How the rows of a step travel to one rank and through it. N nodes, W waves.

    `requests`: of its node on its rail, and `counts_NW` of them from each other node (its own: 0). `starts` int64
    [ranks per node]: where those of each rank of the node begin in that rank's plan. `asked` int64 [R]: row ids that
    other nodes ask of this rank, sorted by node, wave, row id, `asked_NW` from each. `arrivals` int64 [U]: for each of
    the rank's own distinct rows its place in what the rank of its rail receives; -1 where the node itself owns the row.
    `received`: where each rank of the node receives rows, [rows from other nodes, row_dim], readable by all of them.
    """

    requests: NodeRequests
    starts: Int64
    counts_NW: Int64
    asked: Int64
    asked_NW: Int64
    arrivals: Int64
    received: list[NDArray[Any]]

    def asked_pieces(self, wave: int) -> list[slice]:
        """The places in `asked` of a wave, node by node."""
        ends = np.cumsum(self.asked_NW.reshape(-1)).reshape(self.asked_NW.shape)
        starts = ends - self.asked_NW
        return [slice(int(start), int(stop)) for start, stop in zip(starts[:, wave], ends[:, wave], strict=True)]


@dataclass(frozen=True, eq=False)
class Reads:
    """What a rank reads in one wave from one rank of its node, into which places of its distinct rows; all int64.

    Of that rank's shard: `local_rows`, to `own_places`. Of what it has received: the rows at `arrivals`, to
    `received_places`.
    """

    local_rows: Int64
    own_places: Int64
    arrivals: Int64
    received_places: Int64


def plan_reads(plan: GatherPlan, arrivals: Int64, layout: RowLayout, node: int, num_waves: int) -> list[list[Reads]]:
    """For every wave, and in it for every rank of the `node`, what is read; `arrivals` as in `Route`."""
    owners, local_rows = layout.owner(plan.unique_rows), layout.local_index(plan.unique_rows)
    reads = []
    for wave in range(num_waves):
        of_wave = []
        for rail in range(layout.shards_per_node):
            span = plan.of_rail(rail)
            places = span.start + np.flatnonzero(plan.waves[span] == wave)
            own = places[owners[places] == node * layout.shards_per_node + rail]
            received = places[arrivals[places] >= 0]
            of_wave.append(Reads(local_rows[own], own, arrivals[received], received))
        reads.append(of_wave)
    return reads
