"""Which ranks share a node: they open each other's rows in shared memory, and only nodes exchange over the network.

Ranks are numbered node by node, S of them on each of N nodes, as torchrun and Slurm do. The s-th ranks of all nodes
form *rail* s: a node's requests to the s-th rank of another node go through its own s-th rank.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from engram_megatron.errors import UsageError


@dataclass(frozen=True)
class Topology:
    """`num_nodes` nodes of `ranks_per_node` ranks, seen from `rank`."""

    rank: int
    num_nodes: int
    ranks_per_node: int

    @property
    def node(self) -> int:
        return self.rank // self.ranks_per_node

    @property
    def rail(self) -> int:
        """This rank's number on its node."""
        return self.rank % self.ranks_per_node

    def node_groups(self) -> list[list[int]]:
        """The ranks of each node."""
        size = self.ranks_per_node
        return [list(range(node * size, (node + 1) * size)) for node in range(self.num_nodes)]

    def rail_groups(self) -> list[list[int]]:
        """The ranks of each rail, node by node."""
        return [list(ranks) for ranks in zip(*self.node_groups(), strict=True)]


def topology_of(hosts: Sequence[str], rank: int, ranks_per_node: int) -> Topology:
    """The topology of a job whose rank r runs on `hosts[r]`; `ranks_per_node` 0: the ranks of a host are a node.

    Raises:
        UsageError: nodes would have different numbers of ranks, ranks that are not numbered node by node, or ranks on
            several hosts.
    """
    size = ranks_per_node or hosts.count(hosts[0])
    if len(hosts) % size:
        raise UsageError(_uneven(hosts, size))
    groups = [set(hosts[first : first + size]) for first in range(0, len(hosts), size)]
    if any(len(group) > 1 for group in groups):
        raise UsageError(_uneven(hosts, size))
    if ranks_per_node == 0 and len({host for group in groups for host in group}) != len(groups):
        raise UsageError(_uneven(hosts, size))
    return Topology(rank, len(groups), size)


def find_topology(group: dist.ProcessGroup, ranks_per_node: int) -> Topology:
    """`topology_of` all ranks of the job; collective over `group`, which holds all of them."""
    hosts: list[str] = [""] * dist.get_world_size(group)
    dist.all_gather_object(hosts, _host(), group=group)
    return topology_of(hosts, dist.get_rank(group), ranks_per_node)


def _host() -> str:
    """This machine as booted now, and who runs there: other users cannot open our memory."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()} {boot.read_text().strip() if boot.exists() else ''} {os.getuid()}"


def _uneven(hosts: Sequence[str], size: int) -> str:
    names = [host.split(" ")[0] for host in hosts]
    counts = ", ".join(f"{name}: ranks {_ranges(names, name)}" for name in dict.fromkeys(names))
    return (
        f"Engram tables: {len(hosts)} ranks cannot be nodes of {size} ranks each, numbered node by node ({counts}); "
        "start the same number of ranks on every node, in order, or set tables.ranks_per_node (1: ranks share nothing)"
    )


def _ranges(names: Sequence[str], name: str) -> str:
    of_host = [rank for rank, other in enumerate(names) if other == name]
    return f"{of_host[0]}..{of_host[-1]}" if of_host == list(range(of_host[0], of_host[-1] + 1)) else str(of_host)
