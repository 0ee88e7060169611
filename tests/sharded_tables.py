"""Sharded tables on several ranks, for tests: nodes are made up, so that one machine shows what several would do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from engram_kernels.catch_up import CatchUp
from engram_megatron import platform
from engram_megatron.gather.groups import make_groups, open_node_shards
from engram_megatron.gather.lookup import RowLookup
from engram_megatron.gather.topology import Topology
from engram_megatron.optimizer.row_adam import RowAdam
from engram_megatron.tables.row_layout import RowLayout
from engram_megatron.tables.row_store import Placement
from engram_megatron.tables.table_shard import TableShard


@dataclass(frozen=True, kw_only=True)
class Tables:
    """A table of small rows, N(0, 1) at the start, and how it is dealt. Betas (0.9, 0.95), eps 1e-20."""

    rows: int
    row_dim: int
    block_rows: int = 16
    dtype: Any = "float32"
    ranks_per_node: int = 1
    transport: Any = "gloo"
    num_waves: int = 1
    placement: Placement | None = None  # None: in memory
    touched_only: bool = False
    eps: float = 1e-20
    seed: int = 5


def sharded_tables(tables: Tables, rank: int = 0, world_size: int = 1) -> tuple[RowLookup, RowAdam]:
    """A rank's lookup and optimizer. Collective; a single process needs no process group."""
    if world_size > 1:
        platform.limit_threads(1)  # or the idle threads of all ranks keep each other from the cores
    topology = Topology(rank, world_size // tables.ranks_per_node, tables.ranks_per_node)
    layout = RowLayout(tables.rows, tables.block_rows, world_size, topology.num_nodes)
    shard = TableShard(layout, rank, tables.row_dim, tables.dtype, placement=tables.placement)
    shard.initialize(tables.seed, std=1.0)
    shards = open_node_shards(shard, topology)
    for other in shards:
        other.initial = shard.initial
    adam = RowAdam(shard, CatchUp(0.9, 0.95, tables.eps), touched_only=tables.touched_only)
    groups = make_groups(topology, timeout_s=60, kind=tables.transport)
    return RowLookup(shards, adam.read_as_of, groups, tables.num_waves), adam
