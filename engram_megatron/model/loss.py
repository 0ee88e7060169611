"""Next-token loss, summed over the tokens that count."""

from __future__ import annotations

import torch
from torch import Tensor


def token_loss_sum(logits_BTV: Tensor, labels_BT: Tensor, loss_mask_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of cross entropies in nats over positions where `loss_mask_BT` (bool) is True, and their number.

    Computed in float32, or float64 for float64 logits. Returns (scalar loss sum, scalar int64 count). Dividing by the
    *global* count is the caller's: positions differ in number between microbatches and ranks.
    """
    dtype = torch.float64 if logits_BTV.dtype == torch.float64 else torch.float32
    losses = torch.nn.functional.cross_entropy(
        logits_BTV.flatten(0, 1).to(dtype), labels_BT.flatten(), reduction="none"
    )
    mask = loss_mask_BT.flatten()
    return (losses * mask).sum(), mask.sum()
