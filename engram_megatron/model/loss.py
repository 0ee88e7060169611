"""Next-token loss, summed over the tokens that count.

Shapes: B sequences, T positions, N = B * T; V the vocabulary, or under tensor parallelism this rank's share of it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def token_loss_sum(
    logits_BTV: Tensor, labels_BT: Tensor, loss_mask_BT: Tensor, vocabulary_group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """Sum of cross entropies in nats over positions where `loss_mask_BT` (bool) is True, and their number.

    Rank r of `vocabulary_group` holds the logits of ids r * V to (r + 1) * V - 1; all ranks return the same.
    Computed in float32, or float64 for float64 logits. Returns (scalar loss sum, scalar int64 count). Dividing by the
    *global* count is the caller's: positions differ in number between microbatches and ranks.
    """
    dtype = torch.float64 if logits_BTV.dtype == torch.float64 else torch.float32
    logits_NV, labels_N = logits_BTV.flatten(0, 1).to(dtype), labels_BT.flatten()
    if vocabulary_group.size() == 1:
        losses_N = torch.nn.functional.cross_entropy(logits_NV, labels_N, reduction="none")
    else:
        losses_N = _ShardedCrossEntropy.apply(logits_NV, labels_N, vocabulary_group)  # type: ignore[no-untyped-call]
    mask = loss_mask_BT.flatten()
    return (losses_N * mask).sum(), mask.sum()


class _ShardedCrossEntropy(torch.autograd.Function):
    """Cross entropy of logits whose vocabulary is divided over the ranks of a group, in the dtype of the logits.

    megatron-core's `vocab_parallel_cross_entropy` converts to float32, which would hide errors that float64 runs show.
    The gradient is that of this rank's logits for a loss that is counted once, not once per rank.
    """

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, labels_N: Tensor, group: dist.ProcessGroup) -> Tensor:
        largest_N = logits_NV.detach().amax(dim=-1)
        dist.all_reduce(largest_N, op=dist.ReduceOp.MAX, group=group)
        shifted_NV = logits_NV - largest_N[:, None]
        share = logits_NV.shape[-1]
        local_N = labels_N - group.rank() * share
        mine_N = (local_N >= 0) & (local_N < share)
        local_N = local_N.clamp(0, share - 1)
        target_N = torch.where(mine_N, shifted_NV.gather(-1, local_N[:, None])[:, 0], 0.0)
        probability_NV = shifted_NV.exp_()
        sums_2N = torch.stack([probability_NV.sum(dim=-1), target_N])
        dist.all_reduce(sums_2N, group=group)
        probability_NV /= sums_2N[0][:, None]
        ctx.save_for_backward(probability_NV, local_N, mine_N)
        return sums_2N[0].log() - sums_2N[1]

    @staticmethod
    def backward(ctx: Any, gradient_N: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        probability_NV, local_N, mine_N = ctx.saved_tensors
        gradient_NV = probability_NV * gradient_N[:, None]
        gradient_NV.scatter_add_(-1, local_N[:, None], -(gradient_N * mine_N)[:, None])
        return gradient_NV, None, None
