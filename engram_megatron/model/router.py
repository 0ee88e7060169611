"""DeepSeek-V3's router: sigmoid scores, a balancing bias that only chooses, weights that sum to the scaling factor.

Shape letters: T positions and B sequences of a microbatch on this rank, N = T * B tokens, E experts, K chosen.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor


class SigmoidRouter(TopKRouter):
    """megatron-core's router with its choice written out (arXiv 2412.19437, Eq. 13 to 16; arXiv 2408.15664).

    megatron-core 0.19.2 takes the sigmoid in float32 even of float64 scores, which hides from a float64 run whether two
    layouts are equal: a difference in the last bit is either lost or enlarged to 6e-8. Here the scores stay in their
    own type, float32 at least. In float32 and bfloat16 the results are megatron-core's, bit for bit.
    """

    def routing(self, logits_TBE: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(weights [N, E], zero for experts that were not chosen, in the type of the logits; choice bool [N, E])."""
        logits_NE = logits_TBE.flatten(0, 1)
        scores_NE = logits_NE.to(torch.promote_types(logits_NE.dtype, torch.float32)).sigmoid()
        chosen_NK = self.choose(scores_NE + self.expert_bias)
        picked_NK = scores_NE.gather(1, chosen_NK)
        if self.topk > 1:
            picked_NK = picked_NK / (picked_NK.sum(dim=-1, keepdim=True) + 1e-20)
        weights_NK = (picked_NK * self.config.moe_router_topk_scaling_factor).type_as(logits_NE)
        weights_NE = torch.zeros_like(logits_NE).scatter(1, chosen_NK, weights_NK)
        choice_NE = torch.zeros_like(logits_NE, dtype=torch.bool).scatter(1, chosen_NK, True)
        self._apply_expert_bias(choice_NE, padding_mask)  # counts the tokens of each expert where there is a gradient
        return weights_NE, choice_NE

    def choose(self, biased_NE: Tensor) -> Tensor:
        """Experts [N, K] of the largest biased scores."""
        return torch.topk(biased_NE, k=self.topk, dim=1).indices
