"""What a slice of a sequence sees of the slices before it, under sequence parallelism.

Shapes: S positions of this rank's slice, H positions of the halo; further dimensions are carried along. Rank r of the
group holds positions r * S to (r + 1) * S - 1.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def left_halo(slice_S: Tensor, size: int, group: dist.ProcessGroup) -> Tensor:
    """The `size` positions before this rank's slice; fewer where the sequence starts in them, none on the first rank.

    slice_S [S, ...], of equal shape on all ranks of `group`; a slice may be shorter than the halo, which then reaches
    back over several ranks. Differentiable: gradients go back to the ranks that hold the positions. Collective,
    forward and backward, over `group`.
    """
    halo: Tensor = _LeftHalo.apply(slice_S, size, group)  # type: ignore[no-untyped-call]
    return halo


class _LeftHalo(torch.autograd.Function):
    """All ranks gather the tails of all slices, the parts that a later rank can need. Few positions, one collective,
    and the same on gloo and NCCL; neighbours alone would do, but not where a slice is shorter than the halo."""

    @staticmethod
    def forward(ctx: Any, slice_S: Tensor, size: int, group: dist.ProcessGroup) -> Tensor:
        length, rank = slice_S.shape[0], group.rank()
        tail = min(size, length)
        ctx.group, ctx.tail, ctx.shape = group, tail, slice_S.shape
        ctx.halo = min(size, rank * length)
        tails = slice_S.new_empty((group.size() * tail, *slice_S.shape[1:]))
        dist.all_gather_into_tensor(tails, slice_S[length - tail :].contiguous(), group=group)
        # Tails are either whole slices or at least as long as the halo: the positions before this slice are the last
        # ones of all tails of earlier ranks.
        return tails[rank * tail - ctx.halo : rank * tail].clone()

    @staticmethod
    def backward(ctx: Any, gradient_H: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        rank, tail, group = ctx.group.rank(), ctx.tail, ctx.group
        to_owners = gradient_H.new_zeros((group.size() * tail, *ctx.shape[1:]))
        to_owners[rank * tail - ctx.halo : rank * tail] = gradient_H
        received = gradient_H.new_empty((tail, *ctx.shape[1:]))
        dist.reduce_scatter_tensor(received, to_owners, group=group)
        gradient_S = gradient_H.new_zeros(ctx.shape)
        gradient_S[ctx.shape[0] - tail :] = received
        return gradient_S, None, None
