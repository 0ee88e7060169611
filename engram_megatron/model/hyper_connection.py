"""Manifold-constrained hyper-connections (mHC, arXiv 2512.24880): M residual streams around one sub-layer.

    x_{l+1} = H_res x_l + H_post^T F(H_pre x_l)

with H_pre = sigmoid, H_post = 2 sigmoid and H_res doubly stochastic (Sinkhorn-Knopp), all computed per token from the
normalised streams. Shape legend: T positions, B sequences, M streams, C hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from engram_megatron import platform
from engram_megatron.config import HyperConnectionConfig

_TORCH_DTYPE = {"float32": torch.float32, "float64": torch.float64}


def sinkhorn(logits: Tensor, iterations: int) -> Tensor:
    """Doubly stochastic matrices from `logits` [..., M, M]: exp, then `iterations` of column and row normalisation.

    Rows of the result sum to 1 exactly (the last step), columns up to convergence (mHC paper, section 4.2:
    M_t = T_r(T_c(M_{t-1})), t_max = 20). The largest value is taken off first; it cancels.
    """
    m = logits.shape[-1]
    # Rows and columns first, tokens last: the CPU then works on long vectors instead of on M values at a time.
    matrix_MMN = logits.reshape(-1, m * m).t().contiguous().view(m, m, -1)
    matrix_MMN = (matrix_MMN - matrix_MMN.amax(dim=(0, 1))).exp()
    for _ in range(iterations):
        matrix_MMN = matrix_MMN / matrix_MMN.sum(dim=0)
        matrix_MMN = matrix_MMN / matrix_MMN.sum(dim=1, keepdim=True)
    return matrix_MMN.view(m * m, -1).t().contiguous().view(logits.shape)


@dataclass(frozen=True)
class StreamMixing:
    """What one sub-layer needs to write its output back. `post_TBM` and `res_TBMM` are in the mapping dtype."""

    post_TBM: Tensor
    res_TBMM: Tensor

    def merge(self, streams_TBMC: Tensor, output_TBC: Tensor) -> Tensor:
        """H_res x + H_post^T output, mixed in the wider of the two dtypes, returned in the dtype of the streams.

        Not in bfloat16: rows of H_res would sum to 0.9996 there, and 60 sub-layers would lose 2.6 % of the signal.
        """
        dtype = torch.promote_types(streams_TBMC.dtype, self.res_TBMM.dtype)
        mixed = self.res_TBMM.to(dtype) @ streams_TBMC.to(dtype)
        output = output_TBC.to(dtype).unsqueeze(-2)
        return torch.addcmul(mixed, self.post_TBM.to(dtype).unsqueeze(-1), output).to(streams_TBMC.dtype)


class HyperConnection(nn.Module):
    """The three mappings of one sub-layer, with their parameters in `config.mapping_dtype` whatever the model's.

    Parameters (names after megatron-core's main branch): `mapping.weight` [M*M + 2M, M*C] holds phi_pre, phi_post and
    phi_res; `alpha` [3] the gating factors; `bias` [M*M + 2M] the static part. The RMSNorm over all M*C values has no
    weight of its own (the paper absorbs it into phi), so it is applied after the product.

    Args:
        home_stream: the stream that this sub-layer reads at the start (near_identity initialisation).
        sequence_parallel: tag the parameters so that their gradients are summed over the tensor-parallel group.
    """

    def __init__(
        self,
        config: HyperConnectionConfig,
        *,
        hidden_size: int,
        home_stream: int,
        norm_eps: float,
        sequence_parallel: bool = False,
    ) -> None:
        super().__init__()
        self.num_streams = config.num_streams
        self.iterations = config.sinkhorn_iterations
        self.init: Literal["near_identity", "zero_bias"] = config.init
        self.alpha_init = config.alpha_init
        self.home_stream = home_stream
        self.norm_eps = norm_eps
        self.mapping_dtype = _TORCH_DTYPE[config.mapping_dtype]
        outputs = self.num_streams**2 + 2 * self.num_streams
        where: dict[str, Any] = {"dtype": self.mapping_dtype, "device": platform.device()}
        self.mapping = nn.Linear(self.num_streams * hidden_size, outputs, bias=False, **where)
        self.bias = nn.Parameter(torch.empty(outputs, **where))
        self.alpha = nn.Parameter(torch.empty(3, **where))
        for parameter in self.parameters():
            parameter.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        """near_identity: phi = 0, H_res close to I, H_pre close to the home stream. zero_bias: Xavier phi, no bias.

        The first is quoted from a third-party reading of the paper's appendix, the second is Megatron's.
        """
        self.alpha.fill_(self.alpha_init)
        self.bias.zero_()
        if self.init == "zero_bias":
            nn.init.xavier_uniform_(self.mapping.weight, generator=generator)
            return
        self.mapping.weight.zero_()
        m = self.num_streams
        self.bias[:m] = -3.0
        self.bias[self.home_stream] = 3.0
        self.bias[2 * m :] = (6.0 * torch.eye(m) - 3.0).flatten().to(self.bias)

    def forward(self, streams_TBMC: Tensor) -> tuple[Tensor, StreamMixing]:
        """Return the sub-layer's input H_pre x [T, B, C] and what merges its output back."""
        m = self.num_streams
        flat = streams_TBMC.flatten(-2).to(self.mapping_dtype)
        inverse_rms = torch.rsqrt(flat.square().mean(dim=-1, keepdim=True) + self.norm_eps)
        raw = self.mapping(flat) * inverse_rms
        alpha = self.alpha.repeat_interleave(
            torch.tensor([m, m, m * m], device=self.alpha.device), output_size=m * m + 2 * m
        )
        pre_TBM, post_TBM, res_flat = torch.addcmul(self.bias, raw, alpha).split([m, m, m * m], dim=-1)
        res_TBMM = sinkhorn(res_flat.unflatten(-1, (m, m)), self.iterations)
        dtype = torch.promote_types(streams_TBMC.dtype, self.mapping_dtype)
        hidden = (pre_TBM.sigmoid().to(dtype).unsqueeze(-2) @ streams_TBMC.to(dtype)).squeeze(-2)
        return hidden.to(streams_TBMC.dtype), StreamMixing(2 * post_TBM.sigmoid(), res_TBMM)


def expand_streams(hidden_TBC: Tensor, num_streams: int) -> Tensor:
    """Every stream starts as a copy of the embedding: [T, B, M * C]."""
    return hidden_TBC.repeat(1, 1, num_streams)


def contract_streams(streams_TBMC: Tensor) -> Tensor:
    """The mean of the streams. (The paper does not say; a sum differs by a factor that the final RMSNorm removes.)"""
    return streams_TBMC.mean(dim=-2)


def stream_cosine(streams_TBMC: Tensor) -> Tensor:
    """Mean cosine between different streams, a float32 scalar: 1 means that they carry the same and are wasted."""
    unit = nn.functional.normalize(streams_TBMC.detach().float(), dim=-1)
    gram = unit @ unit.transpose(-1, -2)
    m = gram.shape[-1]
    return ((gram.sum(dim=(-2, -1)) - m) / (m * (m - 1))).mean()
