"""Which positions of a sequence a rank holds, under context and sequence parallelism: arithmetic, no process groups.

Context parallelism deals the sequence out in a zigzag, as megatron-core does: of 2 * context equal chunks, context rank
c holds chunks c and 2 * context - 1 - c, one behind the other. A chunk late in the sequence attends to many keys, an
early one to few; together every rank has the same causal work. Sequence parallelism (wherever tensor > 1) then divides
what a context rank holds into `tensor` equal consecutive slices.

A *block* is the largest run of positions that no rank's share cuts: length / tensor positions without context
parallelism, length / (2 * context * tensor) with it. A rank holds one or two of them, its *pieces*.

Ranks are those of megatron-core's tensor-and-context-parallel group: rank = context rank * tensor + tensor rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class SequencePartition:
    """A sequence over `context` * `tensor` ranks. Its length must divide by `divisor`."""

    context: int = 1
    tensor: int = 1

    @property
    def num_ranks(self) -> int:
        return self.context * self.tensor

    @property
    def num_pieces(self) -> int:
        """Pieces of one rank, all of one block."""
        return 1 if self.context == 1 else 2

    @property
    def divisor(self) -> int:
        """Number of blocks."""
        return self.num_ranks * self.num_pieces

    def block_length(self, length: int) -> int:
        """Positions of a block of a sequence of `length`."""
        block, rest = divmod(length, self.divisor)
        assert rest == 0, f"{length} positions do not divide over {self.num_ranks} ranks in {self.divisor} blocks"
        return block

    def blocks(self, rank: int) -> list[int]:
        """The blocks of `rank`, in the order in which it holds them."""
        context_rank, tensor_rank = divmod(rank, self.tensor)
        return self.context_blocks(context_rank)[tensor_rank * self.num_pieces :][: self.num_pieces]

    def context_blocks(self, context_rank: int) -> list[int]:
        """The blocks of all tensor ranks of `context_rank`, in the order in which they hold them."""
        chunks = [0] if self.context == 1 else [context_rank, 2 * self.context - 1 - context_rank]
        return [chunk * self.tensor + block for chunk in chunks for block in range(self.tensor)]

    def piece_starts(self, length: int, rank: int) -> list[int]:
        """First positions of the pieces of `rank`; each has `block_length` positions."""
        return [block * self.block_length(length) for block in self.blocks(rank)]

    def chunks(self, length: int, context_rank: int) -> list[range]:
        """The runs of positions that `context_rank` holds, in its order: one, or two under context parallelism."""
        size = length // (self.context * self.num_pieces)
        starts = [block * self.block_length(length) for block in self.context_blocks(context_rank)[:: self.tensor]]
        return [range(start, start + size) for start in starts]

    def positions(self, length: int, rank: int) -> NDArray[np.int64]:
        """Positions of hidden states on `rank`, in its order."""
        return self._positions(length, self.blocks(rank))

    def context_positions(self, length: int, context_rank: int) -> NDArray[np.int64]:
        """Positions of tokens, labels and attention's queries on every tensor rank of `context_rank`, in its order."""
        return self._positions(length, self.context_blocks(context_rank))

    def _positions(self, length: int, blocks: list[int]) -> NDArray[np.int64]:
        size = self.block_length(length)
        return np.concatenate([np.arange(block * size, (block + 1) * size) for block in blocks])
