"""Which shard owns which rows. Arithmetic only: no memory, no communication.

Rows are cut into blocks of `block_rows` consecutive rows (the last may be shorter). Blocks are dealt in turn over the
nodes, and those of a node over its shards, so that neither a node nor a shard owns the hot heads alone: with N nodes of
S shards each, block b goes to shard b // N % S of node b % N. Shards are numbered node by node, as ranks are. A shard
stores its blocks one after another; only the last block of the space is short, and it is the last of its shard, so
local rows are numbered without holes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from engram_megatron.errors import UsageError


class Block(NamedTuple):
    """Rows start .. stop - 1 of the joined row space, stored from `local_start` on in their owner's shard."""

    number: int
    start: int
    stop: int
    local_start: int

    @property
    def num_rows(self) -> int:
        return self.stop - self.start

    @property
    def local(self) -> slice:
        """The block's rows in its owner's arrays."""
        return slice(self.local_start, self.local_start + self.num_rows)


@dataclass(frozen=True)
class RowLayout:
    """Block-cyclic dealing of rows 0 .. total_rows - 1 to shards 0 .. num_shards - 1 on `num_nodes` nodes.

    Raises `UsageError` for sizes below one, and where nodes would have different numbers of shards. A shard may own
    nothing (more shards than blocks).
    """

    total_rows: int
    block_rows: int
    num_shards: int
    num_nodes: int = 1

    def __post_init__(self) -> None:
        for name in ("total_rows", "block_rows", "num_shards", "num_nodes"):
            if getattr(self, name) < 1:
                raise UsageError(f"table layout: {name} = {getattr(self, name)} must be at least 1")
        if self.num_shards % self.num_nodes:
            raise UsageError(
                f"table layout: {self.num_shards} ranks are not divisible by {self.num_nodes} nodes; run the same "
                "number of ranks on every node, or set tables.ranks_per_node"
            )

    @property
    def num_blocks(self) -> int:
        return -(-self.total_rows // self.block_rows)

    @property
    def shards_per_node(self) -> int:
        return self.num_shards // self.num_nodes

    def owner(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Shard that owns each row id (int64, any shape)."""
        turn = rows // self.block_rows % self.num_shards
        return turn % self.num_nodes * self.shards_per_node + turn // self.num_nodes

    def local_index(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Place of each row id within its owner's arrays (int64, any shape)."""
        block, offset = np.divmod(rows, self.block_rows)
        return block // self.num_shards * self.block_rows + offset

    def global_row(self, shard: int, local: NDArray[np.int64]) -> NDArray[np.int64]:
        """Row id of each local row of `shard`; the inverse of `owner` and `local_index` together."""
        local_block, offset = np.divmod(local, self.block_rows)
        return (local_block * self.num_shards + self._turn(shard)) * self.block_rows + offset

    def num_local_blocks(self, shard: int) -> int:
        return max(0, -(-(self.num_blocks - self._turn(shard)) // self.num_shards))

    def num_local_rows(self, shard: int) -> int:
        """Rows that `shard` stores."""
        owned = self.num_local_blocks(shard)
        if owned == 0:
            return 0
        last = self._turn(shard) + (owned - 1) * self.num_shards
        missing = max(0, (last + 1) * self.block_rows - self.total_rows)
        return owned * self.block_rows - missing

    def local_starts(self, shard: int, rows: Sequence[int]) -> list[int]:
        """For each of `rows` (0 .. total_rows) how many rows before it `shard` stores: its own come in their order."""
        return [replace(self, total_rows=row).num_local_rows(shard) if row > 0 else 0 for row in rows]

    def blocks(self, shard: int) -> Iterator[Block]:
        """The shard's blocks in the order in which it stores them."""
        for local_block, number in enumerate(range(self._turn(shard), self.num_blocks, self.num_shards)):
            start = number * self.block_rows
            stop = min(start + self.block_rows, self.total_rows)
            yield Block(number, start, stop, local_block * self.block_rows)

    def _turn(self, shard: int) -> int:
        """When in a round of `num_shards` blocks a shard gets its one. Shard 0 is the first."""
        node, place = divmod(shard, self.shards_per_node)
        return place * self.num_nodes + node
