"""A rank's ways to the others: its node, and the ranks with its number on all nodes. See `topology`."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from engram_megatron.errors import UsageError
from engram_megatron.gather.topology import Topology
from engram_megatron.gather.transport import LoopbackTransport, Transport, TransportKind, group_transport
from engram_megatron.tables.table_shard import TableShard


@dataclass(frozen=True, eq=False)
class NodeGroups:
    """`node` exchanges between the ranks of this node, `rail` between the ranks of this rail, one of each node.

    `node_group` None: this rank is alone on its node. The groups are gloo's own and nothing else uses them:
    collectives of the backbone never queue behind these, nor these behind them, and a thread of its own may drive them.
    """

    topology: Topology
    node: Transport
    rail: Transport
    node_group: dist.ProcessGroup | None

    def sum_over_ranks(self, numbers: NDArray[np.float64]) -> NDArray[np.float64]:
        """The sum of all ranks' `numbers` (float64, one shape), the same to the bit on every rank. Collective."""
        for transport in (self.node, self.rail):
            one_each = np.ones(transport.size, np.int64)
            copies = torch.from_numpy(np.stack([numbers] * transport.size))
            received = transport.exchange(copies, one_each, one_each, what="sums over rows")
            numbers = np.add.reduce(received.numpy())
        return numbers

    def node_barrier(self) -> None:
        """Wait for all ranks of the node."""
        if self.node_group is not None:
            dist.barrier(group=self.node_group)


def make_groups(topology: Topology, timeout_s: float, kind: TransportKind = "gloo") -> NodeGroups:
    """Collective over all ranks; `kind` is that between nodes. An exchange that takes longer than `timeout_s` raises.

    Raises:
        UsageError: this kind cannot work here, on every rank alike.
    """
    if topology.num_nodes * topology.ranks_per_node == 1:
        return NodeGroups(topology, LoopbackTransport(), LoopbackTransport(), None)
    node_group = None
    for ranks in topology.node_groups():  # torch wants every rank to make every group
        group = dist.new_group(ranks, backend="gloo", timeout=timedelta(seconds=timeout_s))
        node_group = group if topology.rank in ranks and len(ranks) > 1 else node_group
    return NodeGroups(
        topology,
        group_transport("gloo", topology.node_groups(), timeout_s),
        group_transport(kind, topology.rail_groups(), timeout_s),
        node_group,
    )


def open_node_shards(shard: TableShard, topology: Topology, group: dist.ProcessGroup | None = None) -> list[TableShard]:
    """The shards of all ranks of this rank's node, in their order: its own `shard`, those of others in shared memory.

    Collective over `group`, which holds all ranks (None: the default group).

    Raises:
        UsageError: the tables of any two ranks are not parts of one table, or another's cannot be opened.
    """
    handles = [shard.handle] * topology.num_nodes * topology.ranks_per_node
    if len(handles) > 1:
        dist.all_gather_object(handles, shard.handle, group=group)
    for rank, handle in enumerate(handles):
        if handle.table != handles[0].table:
            raise UsageError(
                f"rank {rank} has other Engram tables than rank 0: {handle.table} and {handles[0].table}; start all "
                "ranks with one version of the code and one configuration"
            )
    of_node = topology.node_groups()[topology.node]
    return [shard if rank == topology.rank else TableShard.open(handles[rank]) for rank in of_node]
