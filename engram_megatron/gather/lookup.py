"""Rows of the sharded tables for a rank's batch, and the way of their gradients to the owners.

    plan      distinct rows of the batch; merged per rail over the ranks of the node; ids to the owners' nodes
    fetch     one wave: owners read for other nodes; rows over the network, once per node; every rank reads what its
              node owns from shared memory, and the rest from what its node received
    return    gradients, summed over the ranks of the node, to the owners, who sum over nodes

All three are collective over all ranks, in one order on every rank; a thread of its own may drive them. Nothing here
writes to a shard: rows are read as of `catch_up.step`, so a fetch must not run beside an update.

Shape legend: U distinct rows of this rank's batch, M of its node on its rail, R rows that other nodes ask of this rank,
D row_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from engram_kernels.catch_up import CatchUp
from engram_kernels.gather_rows import gather_rows
from engram_kernels.segment_sum import sum_pieces
from engram_megatron.gather.buffers import BufferPool, SharedBufferPool
from engram_megatron.gather.groups import NodeGroups
from engram_megatron.gather.plan import (
    GatherPlan,
    Int64,
    NodeRequests,
    Route,
    hottest_lookups,
    make_plan,
    merge_requests,
    plan_reads,
)
from engram_megatron.gather.statistics import GatherStatistics
from engram_megatron.gather.transport import Transport, TransportError
from engram_megatron.gather.unique_rows import UniqueRows
from engram_megatron.tables.row_gradients import RowGradients
from engram_megatron.tables.row_layout import RowLayout
from engram_megatron.tables.table_shard import TableShard

ID_BYTES = 8


class RowLookup:
    """Reads and differentiates rows of the whole table on every rank.

    `shards` are those of this rank's node, by number on the node; `groups` its ways to the other ranks. Rows are read
    as of `catch_up.step`; None: as they stand.
    """

    def __init__(
        self, shards: Sequence[TableShard], catch_up: CatchUp | None, groups: NodeGroups, num_waves: int = 1
    ) -> None:
        topology = groups.topology
        self.shard = shards[topology.rail]
        self.layout: RowLayout = self.shard.layout
        assert (self.layout.num_nodes, self.layout.shards_per_node) == (topology.num_nodes, topology.ranks_per_node)
        assert [shard.shard for shard in shards] == topology.node_groups()[topology.node]
        self.shards = list(shards)
        self.catch_up = catch_up
        self.groups = groups
        self.topology = topology
        self.num_waves = num_waves
        self._pool = BufferPool()
        self._shared = SharedBufferPool(groups.node_group)

    def read(self, ids: Int64) -> UniqueRows:
        """All rows of `ids` (int64 row ids, any shape, may be empty), here and now."""
        rows = self.plan(ids)
        for wave in range(self.num_waves):
            self.fetch(rows, wave)
        return rows

    def plan(self, ids: Int64) -> UniqueRows:
        """Tell the owners which rows will be read: those of `ids` (int64, any shape, may be empty), all microbatches of
        a step. With several waves the first dimension is that of microbatches (see `make_plan`)."""
        plan = make_plan(ids, self.layout, self.num_waves)
        requests, starts = self._merge(plan)
        counts_NW = requests.counts.copy()
        counts_NW[self.topology.node] = 0  # nothing is sent to oneself
        asked_NW = _tell(self.groups.rail, counts_NW)
        ids_out = torch.from_numpy(self._of_other_nodes(requests.rows, requests))
        asked = self.groups.rail.exchange(ids_out, counts_NW.sum(axis=1), asked_NW.sum(axis=1), what="row ids").numpy()
        self._check_requests(asked, asked_NW.sum(axis=1))
        arrivals = self._arrivals(plan, requests)
        received: list[NDArray[Any]] = []  # of one node: nothing comes from another
        if self.topology.num_nodes > 1:
            mine = self._shared.empty(self._rows_shape(int(counts_NW.sum())), self.shard.stored)
            received = self._shared.share(mine)
        route = Route(requests, starts, counts_NW, asked, asked_NW, arrivals, received)
        reads = plan_reads(plan, arrivals, self.layout, self.topology.node, self.num_waves)
        statistics = self._statistics(plan, route)
        self.shard.read_ahead(self.layout.local_index(asked))
        for shard, *reads_of_waves in zip(self.shards, *reads, strict=True):
            for wave in reads_of_waves:
                shard.read_ahead(wave.local_rows)
        stored = self._pool.empty(self._rows_shape(plan.unique_rows.size), self.shard.stored)
        return UniqueRows(plan, route, reads, statistics, stored, self.shard.dtype, self._shared.empty)

    def fetch(self, rows: UniqueRows, wave: int) -> None:
        """Bring the rows of one wave into `rows.stored`, as of `catch_up.step`."""
        self._receive(rows.route, wave)
        self.groups.node_barrier()  # all of the node have received, and none updates its shard any more
        for rail, (shard, reads) in enumerate(zip(self.shards, rows.reads[wave], strict=True)):
            shard.read(reads.local_rows, self.catch_up, rows.stored, reads.own_places)
            if reads.arrivals.size:
                gather_rows(rows.route.received[rail], reads.arrivals, rows.stored, reads.received_places)
        self.groups.node_barrier()  # all of the node have read: buffers and shards may change

    def return_gradients(self, rows: UniqueRows) -> RowGradients:
        """Send `rows.gradient` to the owners and return those of this rank's own rows.

        A row's gradient is the sum over the ranks of a node in their order, then over nodes in theirs: bit-identical
        from run to run. Every row that was asked for is there, with zeros where no loss depended on it.
        """
        if self.topology.num_nodes * self.topology.ranks_per_node == 1:
            gradients = [rows.gradient.on_host()]
            return RowGradients.summed(self.layout.local_index(rows.plan.unique_rows), gradients, self._pool.empty)
        route = rows.route
        summed_MD = self._sum_over_node(rows)
        outgoing = torch.from_numpy(self._of_other_nodes(summed_MD, route.requests))
        received_RD = self._pool.empty(self._rows_shape(int(route.asked_NW.sum())), self.shard.wide)
        self.groups.rail.exchange(
            outgoing,
            route.counts_NW.sum(axis=1),
            route.asked_NW.sum(axis=1),
            what="gradients",
            out=torch.from_numpy(received_RD),
        )
        own = route.requests.of_node(self.topology.node)
        before = int(route.asked_NW[: self.topology.node].sum())
        keys = np.concatenate([route.asked[:before], route.requests.rows[own], route.asked[before:]])
        values = [received_RD[:before], summed_MD[own], received_RD[before:]]
        return RowGradients.summed(self.layout.local_index(keys), values, self._pool.empty)

    def _rows_shape(self, num_rows: int) -> tuple[int, int]:
        return num_rows, self.shard.row_dim

    def _statistics(self, plan: GatherPlan, route: Route) -> GatherStatistics:
        """What the gather of a step, with the return of its gradients, moves on this rank."""
        asks, asked = int(route.counts_NW.sum()), int(route.asked_NW.sum())
        row_bytes = self.shard.row_dim * self.shard.stored.itemsize
        gradient_bytes = self.shard.row_dim * self.shard.wide.itemsize
        return GatherStatistics(
            lookups=plan.inverse.size,
            unique_rows=plan.unique_rows.size,
            id_bytes_sent=asks * ID_BYTES,
            id_bytes_received=asked * ID_BYTES,
            row_bytes_sent=asked * row_bytes,
            row_bytes_received=asks * row_bytes,
            gradient_bytes_sent=asks * gradient_bytes,
            gradient_bytes_received=asked * gradient_bytes,
            node_row_bytes=int((route.arrivals < 0).sum()) * row_bytes,
            hottest_lookups=hottest_lookups(plan),
        )

    def _merge(self, plan: GatherPlan) -> tuple[NodeRequests, Int64]:
        """The requests of this node on this rank's rail; where they begin in the plan of each rank of the node."""
        starts = np.cumsum(plan.rail_counts) - plan.rail_counts
        if self.topology.ranks_per_node == 1:
            return merge_requests([plan.unique_rows], [plan.waves], self.layout, self.num_waves), starts
        told = _tell(self.groups.node, np.stack([plan.rail_counts, starts], axis=1))
        counts, starts = told[:, 0], told[:, 1]
        sent = torch.from_numpy(np.stack([plan.unique_rows, plan.waves], axis=1))
        asked = self.groups.node.exchange(sent, plan.rail_counts, counts, what="row ids").numpy()
        pieces = np.split(asked, np.cumsum(counts)[:-1])
        rows, waves = [piece[:, 0] for piece in pieces], [piece[:, 1] for piece in pieces]
        return merge_requests(rows, waves, self.layout, self.num_waves), starts

    def _arrivals(self, plan: GatherPlan, requests: NodeRequests) -> Int64:
        """For each of this rank's distinct rows its place in what the rank of its rail receives; -1: in the node."""
        arrivals = requests.arrivals(self.topology.node)
        if self.topology.ranks_per_node == 1:
            return arrivals[requests.places[0]]
        counts = np.array([places.size for places in requests.places], np.int64)
        answers = torch.from_numpy(np.concatenate([arrivals[places] for places in requests.places]))
        return self.groups.node.exchange(answers, counts, plan.rail_counts, what="places of rows").numpy()

    def _receive(self, route: Route, wave: int) -> None:
        """Send what other nodes asked of this rank, and receive what its node asked on its rail."""
        if self.topology.num_nodes == 1:
            return
        served = np.concatenate([route.asked[piece] for piece in route.asked_pieces(wave)])
        outgoing = self._pool.empty(self._rows_shape(served.size), self.shard.stored)
        self.shard.read(self.layout.local_index(served), self.catch_up, outgoing)
        counts = route.counts_NW[:, wave]
        first = int(route.counts_NW[:, :wave].sum())
        incoming = route.received[self.topology.rail][first : first + int(counts.sum())]
        # As bytes: gloo has no 16-bit numbers.
        bytes_out, bytes_in = (torch.from_numpy(rows.view(np.uint8)) for rows in (outgoing, incoming))
        self.groups.rail.exchange(bytes_out, route.asked_NW[:, wave], counts, what="rows", out=bytes_in)

    def _sum_over_node(self, rows: UniqueRows) -> NDArray[Any]:
        """The gradients of the node's requests on this rank's rail, [M, D]."""
        gradient_UD, requests = rows.gradient.on_host(), rows.route.requests
        if self.topology.ranks_per_node == 1:
            summed_MD = self._pool.empty(gradient_UD.shape, gradient_UD.dtype)
            summed_MD[requests.places[0]] = gradient_UD
            return summed_MD
        pieces = []
        for rail, of_rank in enumerate(self._shared.share(gradient_UD)):
            start = int(rows.route.starts[rail])
            pieces.append(of_rank[start : start + requests.places[rail].size])
        summed_MD = sum_pieces(np.concatenate(requests.places), pieces, self._pool.empty).sums
        self.groups.node_barrier()  # all have read
        return summed_MD

    def _of_other_nodes(self, values: NDArray[Any], requests: NodeRequests) -> NDArray[Any]:
        """Of `values` [M, ...] those whose rows other nodes own."""
        own = requests.of_node(self.topology.node)
        before, after = values[: own.start], values[own.stop :]
        out = self._pool.empty((len(before) + len(after), *values.shape[1:]), values.dtype)
        return np.concatenate([before, after], out=out)

    def _check_requests(self, rows: Int64, counts: Int64) -> None:
        """Raise `TransportError` for an id that this rank cannot have been asked for, naming who sent it."""
        rank = self.topology.rank
        known = (rows >= 0) & (rows < self.layout.total_rows) & (self.layout.owner(rows) == rank)
        if known.all():
            return
        first = int(np.flatnonzero(~known)[0])
        node = int(np.searchsorted(np.cumsum(counts), first, side="right"))
        source = self.topology.rail_groups()[self.topology.rail][node]
        raise TransportError(
            f"rank {rank} was asked by rank {source} for row {int(rows[first])}, which is none of its rows "
            f"({int((~known).sum())} of {rows.size} ids are wrong): either the ids were damaged on the way from rank "
            f"{source}, or rank {source} uses another layout than {self.layout}"
        )


def _tell(transport: Transport, numbers: Int64) -> Int64:
    """`numbers[r]` [size, ...] go to rank r of `transport`; the result's entry r came from rank r."""
    one_each = np.ones(transport.size, np.int64)
    told: Int64 = transport.exchange(torch.from_numpy(numbers), one_each, one_each, what="row counts").numpy()
    return told
