"""Parts of a decoder layer: hyper-connections, latent attention, feed-forward.

Shape letters: B sequences, T new positions, Y positions of the cache and the new ones, M streams, C hidden size,
N heads, D query and key width of a head, V its value width, P rope width, K chosen experts.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention, silu

from .configuration_engram import EngramConfig


def hyper_connection(
    streams_BTMC: Tensor, fn: Tensor, base: Tensor, scale: Tensor, iterations: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """What a sub-layer reads [B, T, C], and how its output goes back: post [B, T, M] and res [B, T, M, M] (mHC, arXiv
    2512.24880). Rows of `fn` and `base`: M of pre, M of post, M * M of res."""
    M = streams_BTMC.shape[2]
    flat = streams_BTMC.flatten(-2).float()
    raw = linear(flat, fn) * torch.rsqrt(flat.square().mean(dim=-1, keepdim=True) + eps)
    sizes = [M, M, M * M]
    pre, post, res = (raw * scale.repeat_interleave(torch.tensor(sizes, device=scale.device)) + base).split(sizes, -1)
    hidden = (pre.sigmoid().unsqueeze(-2) @ streams_BTMC.float()).squeeze(-2)
    return hidden.to(streams_BTMC.dtype), 2 * post.sigmoid(), _sinkhorn(res.unflatten(-1, (M, M)), iterations)


def _sinkhorn(logits: Tensor, iterations: int) -> Tensor:
    """Doubly stochastic matrices: exp, then columns and rows are normalised in turn."""
    matrix = (logits - logits.amax(dim=(-2, -1), keepdim=True)).exp()
    for _ in range(iterations):
        matrix = matrix / matrix.sum(dim=-2, keepdim=True)
        matrix = matrix / matrix.sum(dim=-1, keepdim=True)
    return matrix


def merge(streams_BTMC: Tensor, output_BTC: Tensor, post_BTM: Tensor, res_BTMM: Tensor) -> Tensor:
    """The streams after a sub-layer."""
    mixed = res_BTMM @ streams_BTMC.float() + post_BTM.unsqueeze(-1) * output_BTC.float().unsqueeze(-2)
    return mixed.to(streams_BTMC.dtype)


class LatentAttention(nn.Module):
    """Multi-head Latent Attention (arXiv 2405.04434). The cache holds latents and rope keys."""

    def __init__(self, config: EngramConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.heads, self.rank = layer, config.num_attention_heads, config.kv_lora_rank
        self.nope, self.rope, self.value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        width, queries, eps = config.hidden_size, self.heads * (self.nope + self.rope), config.rms_norm_eps
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(width, queries, bias=False)
        else:
            self.q_a_proj = nn.Linear(width, config.q_lora_rank, bias=False)
            self.q_a_layernorm = nn.RMSNorm(config.q_lora_rank, eps=eps)
            self.q_b_proj = nn.Linear(config.q_lora_rank, queries, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(width, self.rank + self.rope, bias=False)
        self.kv_a_layernorm = nn.RMSNorm(self.rank, eps=eps)
        self.kv_b_proj = nn.Linear(self.rank, self.heads * (self.nope + self.value), bias=False)
        self.o_proj = nn.Linear(self.heads * self.value, width, bias=False)
        yarn = config.rope_parameters["rope_type"] == "yarn"
        mscale = _mscale(config.rope_parameters, "mscale_all_dim") if yarn else 1.0
        self.scale = mscale * mscale * (self.nope + self.rope) ** -0.5

    def forward(self, hidden_BTC: Tensor, angles: tuple[Tensor, Tensor], mask_BTY: Tensor | None, cache: Any) -> Tensor:
        """`angles`: cosines and sines [T, P] of the new positions. `mask_BTY` None: causal, without a past."""
        if hasattr(self, "q_proj"):
            query = self.q_proj(hidden_BTC)
        else:
            query = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden_BTC)))
        query_BNTD = query.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        query_nope, query_rope = query_BNTD.split([self.nope, self.rope], dim=-1)
        query_BNTD = torch.cat([query_nope, _rotate(query_rope, *angles)], dim=-1)
        latent, rope = self.kv_a_proj_with_mqa(hidden_BTC).unsqueeze(1).split([self.rank, self.rope], dim=-1)
        latent, rope = self.kv_a_layernorm(latent), _rotate(rope, *angles)
        if cache is not None:
            latent, rope = cache.update(latent, rope, self.layer)
        key_value_BNY = self.kv_b_proj(latent.squeeze(1)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        key_nope, value_BNYV = key_value_BNY.split([self.nope, self.value], dim=-1)
        key_BNYD = torch.cat([key_nope, rope.expand(-1, self.heads, -1, -1)], dim=-1)
        mask = None if mask_BTY is None else mask_BTY.unsqueeze(1)
        attended = scaled_dot_product_attention(
            query_BNTD, key_BNYD, value_BNYV, attn_mask=mask, is_causal=mask is None, scale=self.scale
        )
        output: Tensor = self.o_proj(attended.transpose(1, 2).flatten(2))
        return output


def rotary_angles(config: EngramConfig, start: int, stop: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines [T, P], in the dtype of `like`, of positions start .. stop - 1; YaRN's (arXiv 2309.00071) where
    the config says so."""
    rope, dim = config.rope_parameters, config.qk_rope_head_dim
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=like.device) / dim
    frequencies, concentration = 1.0 / rope["rope_theta"] ** exponents, 1.0
    if rope["rope_type"] == "yarn":
        interpolated = 1.0 / (rope["factor"] * rope["rope_theta"] ** exponents)
        low, high = math.floor(_pair(config, rope["beta_fast"])), math.ceil(_pair(config, rope["beta_slow"]))
        low, high = max(low, 0), min(high, dim - 1)
        pairs = torch.arange(dim // 2, dtype=torch.float32, device=like.device)
        kept = 1.0 - ((pairs - low) / (high - low if high > low else 0.001)).clamp(0, 1)
        frequencies = interpolated * (1 - kept) + frequencies * kept
        concentration = _mscale(rope, "mscale") / _mscale(rope, "mscale_all_dim")
    angles = torch.outer(torch.arange(start, stop, dtype=torch.float32, device=like.device), frequencies)
    angles = torch.cat([angles, angles], dim=-1)
    return (angles.cos() * concentration).to(like.dtype), (angles.sin() * concentration).to(like.dtype)


def _pair(config: EngramConfig, turns: float) -> float:
    rope = config.rope_parameters
    length = rope["original_max_position_embeddings"]
    return config.qk_rope_head_dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(rope["rope_theta"]))


def _mscale(rope: dict[str, Any], name: str) -> float:
    return 1.0 if rope["factor"] <= 1 else 0.1 * rope[name] * math.log(rope["factor"]) + 1.0


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Channels 2i and 2i + 1 are one pair (DeepSeek's order); they come out half a width apart."""
    x = torch.cat([x[..., 0::2], x[..., 1::2]], dim=-1)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))
        return output


class Router(nn.Module):
    """Sigmoid scores; the bias only chooses (DeepSeek-V3, arXiv 2412.19437, Eq. 13 to 16)."""

    def __init__(self, config: EngramConfig) -> None:
        super().__init__()
        self.top_k, self.scaling = config.num_experts_per_tok, config.routed_scaling_factor
        self.weight = nn.Parameter(torch.zeros(config.n_routed_experts, config.hidden_size))
        self.e_score_correction_bias = nn.Buffer(torch.zeros(config.n_routed_experts))

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """(weights, numbers of the experts), each [..., K]."""
        scores = linear(hidden.float(), self.weight.float()).sigmoid()
        chosen = torch.topk(scores + self.e_score_correction_bias.float(), self.top_k, dim=-1).indices
        picked = scores.gather(-1, chosen)
        if self.top_k > 1:
            picked = picked / (picked.sum(dim=-1, keepdim=True) + 1e-20)
        return picked * self.scaling, chosen


class MixtureOfExperts(nn.Module):
    """DeepSeekMoE: routed experts and shared ones."""

    def __init__(self, config: EngramConfig) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.moe_intermediate_size
        self.gate = Router(config)
        self.experts = nn.ModuleList([FeedForward(width, inner) for _ in range(config.n_routed_experts)])
        shared = config.n_shared_experts
        self.shared_experts = FeedForward(width, inner * shared) if shared else None

    def forward(self, hidden_BTC: Tensor) -> Tensor:
        flat = hidden_BTC.flatten(0, 1)
        weights, chosen = self.gate(flat)
        output = torch.zeros_like(flat)
        for number in chosen.unique().tolist():
            token, place = torch.where(chosen == number)
            routed = self.experts[number](flat[token]) * weights[token, place, None].to(flat.dtype)
            output.index_add_(0, token, routed)
        if self.shared_experts is not None:
            output = output + self.shared_experts(flat)
        return output.view_as(hidden_BTC)
