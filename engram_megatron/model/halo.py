"""What the pieces of a rank's share of a sequence see of the positions before them.

Shapes: S positions of this rank's share, P pieces of it (see `sequence_partition`), H positions of the halo; further
dimensions are carried along.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from engram_megatron.model.sequence_partition import SequencePartition


def left_halo(share_S: Tensor, size: int, partition: SequencePartition, group: dist.ProcessGroup) -> Tensor:
    """The `size` positions before each piece of this rank's share, as [H, P, ...]; zeros before the sequence's start.

    share_S [S, ...], of equal shape on all ranks of `group`, whose ranks are those of `partition`. A piece may be
    shorter than its halo, which then reaches back over several pieces. Differentiable: gradients go back to the ranks
    that hold the positions. Collective, forward and backward, over `group`.
    """
    assert group.size() == partition.num_ranks, (group.size(), partition)
    halo: Tensor = _LeftHalo.apply(share_S, size, partition, group)  # type: ignore[no-untyped-call]
    return halo


class _LeftHalo(torch.autograd.Function):
    """All ranks gather the tails of all pieces, the parts that a later piece can need. Few positions, one collective,
    and the same on gloo and NCCL; neighbours alone would do, but not where a piece is shorter than the halo.

    Tails are either whole pieces or exactly as long as the halo: with all of them in the order of the sequence, the
    positions before block b are the last ones of the tails of blocks 0 to b - 1.
    """

    @staticmethod
    def forward(ctx: Any, share_S: Tensor, size: int, partition: SequencePartition, group: dist.ProcessGroup) -> Tensor:
        pieces = share_S.unflatten(0, (partition.num_pieces, -1))
        tail = min(size, pieces.shape[1])
        ctx.size, ctx.tail, ctx.shape, ctx.partition, ctx.group = size, tail, share_S.shape, partition, group
        tails = pieces[:, pieces.shape[1] - tail :].flatten(0, 1).contiguous()
        gathered = tails.new_empty((partition.divisor, tail, *tails.shape[1:]))
        dist.all_gather_into_tensor(gathered.flatten(0, 1), tails, group=group)
        place = _places(partition)
        halo = share_S.new_zeros((size, partition.num_pieces, *share_S.shape[1:]))
        for piece, block in enumerate(partition.blocks(group.rank())):
            for earlier, source, target in _parts(block, tail, size):
                halo[target, piece] = gathered[place[earlier], source]
        return halo

    @staticmethod
    def backward(ctx: Any, gradient_HP: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        partition, tail, group = ctx.partition, ctx.tail, ctx.group
        to_owners = gradient_HP.new_zeros((partition.divisor, tail, *ctx.shape[1:]))
        place = _places(partition)
        for piece, block in enumerate(partition.blocks(group.rank())):
            for earlier, source, target in _parts(block, tail, ctx.size):
                to_owners[place[earlier], source] += gradient_HP[target, piece]
        received = gradient_HP.new_empty((partition.num_pieces, tail, *ctx.shape[1:]))
        dist.reduce_scatter_tensor(received.flatten(0, 1), to_owners.flatten(0, 1), group=group)
        gradient = gradient_HP.new_zeros((partition.num_pieces, ctx.shape[0] // partition.num_pieces, *ctx.shape[1:]))
        gradient[:, gradient.shape[1] - tail :] = received
        return gradient.flatten(0, 1), None, None, None


def _places(partition: SequencePartition) -> dict[int, int]:
    """Where an all-gather over the ranks brings what belongs to each block."""
    blocks = [block for rank in range(partition.num_ranks) for block in partition.blocks(rank)]
    return {block: place for place, block in enumerate(blocks)}


def _parts(block: int, tail: int, size: int) -> list[tuple[int, slice, slice]]:
    """(earlier block, positions of its tail, positions of the halo) of all that the halo of `block` is made of."""
    parts, end = [], size
    while tail > 0 and end > 0 and block > 0:
        block -= 1
        taken = min(tail, end)
        parts.append((block, slice(tail - taken, tail), slice(end - taken, end)))
        end -= taken
    return parts
