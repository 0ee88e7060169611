"""Sharded tables on several ranks, for tests: nodes are made up, so that one machine shows what several would do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from engram_kernels.catch_up import CatchUp
from engram_megatron import platform
from engram_megatron.config_optimizer import OptimizerConfig
from engram_megatron.gather.groups import NodeGroups, make_groups, open_node_shards
from engram_megatron.gather.lookup import RowLookup
from engram_megatron.gather.topology import Topology
from engram_megatron.optimizer.row_adam import RowAdam
from engram_megatron.optimizer.row_sinkhorn import RowSinkhorn
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
    shards, groups = _shards(tables, rank, world_size)
    shard, catch_up = shards[groups.topology.rail], CatchUp(0.9, 0.95, tables.eps)
    adam = RowAdam(shard, catch_up, touched_only=tables.touched_only)
    return RowLookup(shards, adam.read_as_of, groups, tables.num_waves), adam


def balanced_tables(
    tables: Tables, first_rows: Sequence[int], rank: int = 0, world_size: int = 1
) -> tuple[RowLookup, RowSinkhorn]:
    """As `sharded_tables`, with balanced momentum over several tables that begin at `first_rows` (and its defaults)."""
    shards, groups = _shards(tables, rank, world_size, moments=1)
    shard = shards[groups.topology.rail]
    optimizer = RowSinkhorn(shard, [*first_rows, tables.rows], OptimizerConfig(), groups.sum_over_ranks)
    return RowLookup(shards, None, groups, tables.num_waves), optimizer


def _shards(tables: Tables, rank: int, world_size: int, moments: int = 2) -> tuple[list[TableShard], NodeGroups]:
    """The shards of a rank's node, with their initial rows."""
    if world_size > 1:
        platform.limit_threads(1)  # or the idle threads of all ranks keep each other from the cores
    topology = Topology(rank, world_size // tables.ranks_per_node, tables.ranks_per_node)
    layout = RowLayout(tables.rows, tables.block_rows, world_size, topology.num_nodes)
    shard = TableShard(layout, rank, tables.row_dim, tables.dtype, placement=tables.placement, moments=moments)
    shard.initialize(tables.seed, std=1.0)
    shards = open_node_shards(shard, topology)
    for other in shards:
        other.initial = shard.initial
    return shards, make_groups(topology, timeout_s=60, kind=tables.transport)
