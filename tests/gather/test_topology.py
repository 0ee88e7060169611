"""Ranks that are taken for neighbours and are none would read rows of another process; the other way costs the wire."""

import pytest

from engram_megatron.errors import UsageError
from engram_megatron.gather.topology import Topology, topology_of


def test_ranks_of_a_host_are_a_node() -> None:
    topology = topology_of(["a", "a", "b", "b", "c", "c"], rank=3, ranks_per_node=0)
    assert topology == Topology(rank=3, num_nodes=3, ranks_per_node=2)
    assert (topology.node, topology.rail) == (1, 1)
    assert topology.node_groups() == [[0, 1], [2, 3], [4, 5]]
    assert topology.rail_groups() == [[0, 2, 4], [1, 3, 5]]


@pytest.mark.parametrize(("ranks_per_node", "nodes"), [(1, 4), (2, 2), (4, 1)])
def test_a_host_can_be_divided(ranks_per_node: int, nodes: int) -> None:
    assert topology_of(["a"] * 4, 0, ranks_per_node).num_nodes == nodes


@pytest.mark.parametrize(
    ("hosts", "ranks_per_node"),
    [
        (["a", "a", "b"], 0),  # nodes of two sizes
        (["a", "b", "b"], 0),
        (["a", "b", "a", "b"], 0),  # dealt in turn: neighbours by number are strangers
        (["a", "a", "b", "b"], 4),  # more than a host has
        (["a", "a", "a"], 2),
    ],
)
def test_ranks_that_make_no_equal_nodes_are_refused_with_their_hosts(hosts: list[str], ranks_per_node: int) -> None:
    with pytest.raises(UsageError, match=r"cannot be nodes of .* ranks each, numbered node by node \(a: ranks "):
        topology_of(hosts, 0, ranks_per_node)
