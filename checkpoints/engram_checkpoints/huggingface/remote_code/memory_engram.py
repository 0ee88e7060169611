"""Conditional memory (Engram, arXiv 2601.07372): from token ids to an update of the residual streams.

Shape letters: B sequences, T new positions, S = T and the positions before them that the convolution reaches, X = S and
the positions before those that n-grams reach, M streams, C hidden size, H heads, N largest n-gram order, K taps.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .configuration_engram import EngramConfig


class Scale(nn.Module):
    """One parameter `weight`."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(value)


class EngramMemory(nn.Module):
    """One layer's table, projections, gate and convolution. `index`: its number among the Engram layers."""

    def __init__(self, config: EngramConfig, index: int) -> None:
        super().__init__()
        streams = config.hc_mult if config.engram_multi_branch else 1
        width, heads = config.hidden_size, (config.engram_max_ngram_size - 1) * config.engram_n_heads
        self.order, self.norm_eps, self.conv_norm_eps = (
            config.engram_max_ngram_size,
            config.engram_norm_eps,
            config.engram_conv_norm_eps,
        )
        self.multipliers: list[int] = config.engram_hash_identity["multipliers"][index]
        self.pad_id: int = config.engram_hash_identity["pad_id"]
        self.primes: list[list[int]] = config.engram_primes[index]
        self.embed = nn.Embedding(config.engram_num_embeddings[index], config.engram_head_dim)
        outputs = (streams + 1) * width if config.engram_gate else width
        self.wkv = nn.Linear(heads * config.engram_head_dim, outputs, bias=config.engram_bias)
        self.has_gate, self.has_conv, taps = config.engram_gate, config.engram_conv, config.engram_conv_kernel_size
        if self.has_gate:
            self.q_weight = nn.Parameter(torch.ones(streams, width))
            self.k_weight = nn.Parameter(torch.ones(streams, width))
        if self.has_conv:
            self.conv_norm = Scale(torch.ones(streams, width))
            self.conv = Scale(torch.zeros(streams * width, 1, taps))
        self.streams, self.width = streams, width
        self.reach = (taps - 1) * self.order if config.engram_conv else 0  # of the convolution, in positions

    def rows(self, ids_BX: Tensor, position_BX: Tensor) -> Tensor:
        """Row numbers [B, X, H] of the n-grams of compressed ids that end at each position; `position_BX`: distance
        from the start of the document, before which the pad id stands."""
        mix_BX, rows, first_row = ids_BX * self.multipliers[0], [], 0
        for back in range(1, self.order):
            earlier_BX = torch.full_like(ids_BX, self.pad_id)
            earlier_BX[:, back:] = ids_BX[:, : ids_BX.shape[1] - back]
            earlier_BX = torch.where(position_BX >= back, earlier_BX, self.pad_id)
            mix_BX = mix_BX ^ (earlier_BX * self.multipliers[back])
            for prime in self.primes[back - 1]:
                rows.append(mix_BX % prime + first_row)
                first_row += prime
        return torch.stack(rows, dim=-1)

    def forward(
        self, hidden_BTMC: Tensor, ids_BX: Tensor, position_BX: Tensor, past_gate_BYM: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The update [B, T, M, C], and the gates [B, T, M] of the new positions (None without the gate).

        `past_gate_BYM`: gates of the S - T positions before; None without the gate, or where there are none.
        """
        T = hidden_BTMC.shape[1]
        before = min(ids_BX.shape[1] - T, self.reach)
        rows_BSH = self.rows(ids_BX, position_BX)[:, ids_BX.shape[1] - T - before :]
        key_value_BS = self.wkv(self.embed(rows_BSH).flatten(-2))
        value_BSC = key_value_BS[..., -self.width :]
        gate_BTM = None
        if self.has_gate:
            gate_BTM = self._gate(
                hidden_BTMC, key_value_BS[:, before:, : -self.width].unflatten(-1, (self.streams, -1))
            )
            gate_BSM = gate_BTM if past_gate_BYM is None else torch.cat([past_gate_BYM.to(gate_BTM), gate_BTM], dim=1)
            gated_BSMC = (gate_BSM.unsqueeze(-1) * value_BSC.float().unsqueeze(2)).to(value_BSC.dtype)
        else:
            gated_BSMC = value_BSC.unsqueeze(2).expand(-1, -1, self.streams, -1)
        if not self.has_conv:
            return gated_BSMC[:, before:], gate_BTM
        update = gated_BSMC + self._convolve(gated_BSMC, position_BX[:, -gated_BSMC.shape[1] :])
        return update[:, before:], gate_BTM

    def _gate(self, hidden_BTMC: Tensor, key_BTMC: Tensor) -> Tensor:
        """sigmoid of the signed root of RMSNorm(hidden) . RMSNorm(key) / sqrt(C) (Eq. 4, 6; the root is the demo's)."""
        hidden, key = hidden_BTMC.float(), key_BTMC.float()
        dot = (hidden * (self.q_weight.float() * self.k_weight.float()) * key).sum(dim=-1)
        lengths = (_reciprocal_rms(hidden, self.norm_eps) * _reciprocal_rms(key, self.norm_eps)).squeeze(-1)
        score = dot * lengths * self.width**-0.5
        return torch.sigmoid(score.sign() * score.abs().clamp_min(1e-6).sqrt())

    def _convolve(self, gated_BSMC: Tensor, position_BS: Tensor) -> Tensor:
        """SiLU(causal depthwise dilated convolution of RMSNorm(gated)) (Eq. 5), within documents."""
        S, taps = gated_BSMC.shape[1], self.conv.weight.shape[-1]
        wide = gated_BSMC.float()
        normed = wide * _reciprocal_rms(wide, self.conv_norm_eps) * self.conv_norm.weight.float()
        weight_KMC = self.conv.weight.float().view(self.streams, self.width, taps).permute(2, 0, 1)
        total = normed * weight_KMC[taps - 1]
        for tap in range(taps - 1):
            back = (taps - 1 - tap) * self.order
            past = nn.functional.pad(normed, (0, 0, 0, 0, back, 0))[:, :S]
            past = torch.where((position_BS >= back)[..., None, None], past, 0)
            total = torch.addcmul(total, past, weight_KMC[tap])
        return nn.functional.silu(total).to(gated_BSMC.dtype)


def position_in_document(document_ids_BX: Tensor) -> Tensor:
    """How many positions back the document of each position starts. A change of id starts a document."""
    position_X = torch.arange(document_ids_BX.shape[1], device=document_ids_BX.device)
    changed = document_ids_BX[:, 1:] != document_ids_BX[:, :-1]
    starts = torch.zeros_like(document_ids_BX)
    starts[:, 1:] = torch.where(changed, position_X[1:], 0).cummax(dim=1).values
    return position_X - starts


def _reciprocal_rms(x: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)
