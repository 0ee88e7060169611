"""FLOPs of one token from the config alone; the numerator of model FLOPs utilisation (MFU).

What is counted: 2 FLOPs per multiply-add of
- matrix products: attention projections, feed-forwards, router, shared and `top_k` routed experts, hyper-connection
  mappings, Engram's key and value projections, output head;
- causal attention, scores and weighted values, over half of the sequence (no token attends to later ones). Document
  boundaries inside a sequence are not deducted;
- the contractions that are no matrix products: mixing of residual streams (n*n + 2n multiply-adds per channel and
  sub-layer), Engram's gate (one dot product, one scaled addition per stream) and its short convolution.
The backward pass is twice the forward pass: one product for the input's, one for the weights' gradient.

Not counted: norms, activations, softmax, rotary embedding, Sinkhorn iterations, hashing and table lookups, the
optimizer, and anything that recomputation does again (so MFU falls where activations are recomputed).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from engram_megatron.config import RunConfig
from engram_megatron.model.counts import engram_streams, num_moe_layers, parameter_specs

BACKWARD_PER_FORWARD = 2


@dataclass(frozen=True, kw_only=True)
class TokenFlops:
    """FLOPs of the forward pass of one token, by kind."""

    attention_projections: int
    attention_core: int  # scores and weighted values, at the config's sequence length
    feed_forward: int  # dense layers, shared and active routed experts
    router: int
    hyper_connections: int
    engram: int
    head: int
    multi_token_prediction: int  # its layer and its use of the head; in training only

    @property
    def forward(self) -> int:
        """All kinds."""
        return sum(getattr(self, name) for name in self.__dataclass_fields__)

    @property
    def forward_backward(self) -> int:
        """Forward and backward pass."""
        return (1 + BACKWARD_PER_FORWARD) * self.forward


def token_flops(config: RunConfig) -> TokenFlops:
    """FLOPs of one token of `config`, averaged over the positions of a sequence of `data.sequence_length`."""
    return TokenFlops(
        attention_projections=_matrix_flops(config, "attention"),
        attention_core=_attention_core(config, config.model.num_layers),
        feed_forward=_feed_forward(config),
        router=_matrix_flops(config, "router"),
        hyper_connections=_matrix_flops(config, "hyper-connections") + _stream_mixing(config, config.model.num_layers),
        engram=_engram(config),
        head=_matrix_flops(config, "output head"),
        multi_token_prediction=_prediction(config),
    )


def _matrix_flops(config: RunConfig, *parts: str) -> int:
    """Twice the elements of the weight matrices of `parts`: every one multiplies every token once."""
    return 2 * sum(
        prod(spec.shape)
        for spec in parameter_specs(config)
        if spec.part in parts and len(spec.shape) == 2 and "norm" not in spec.name
    )


def _attention_core(config: RunConfig, num_layers: int) -> int:
    """Query-key products over nope + rope channels and weighted values, half of the sequence on average."""
    attention = config.model.attention
    channels = attention.nope_head_dim + attention.rope_head_dim + attention.value_head_dim
    return num_layers * attention.num_heads * channels * config.data.sequence_length


def _feed_forward(config: RunConfig) -> int:
    dense = _matrix_flops(config, "dense feed-forward", "shared experts")
    moe = config.model.moe
    if moe is None:
        return dense
    per_expert = 2 * 3 * config.model.hidden_size * moe.expert_ffn_size
    return dense + num_moe_layers(config.model) * moe.top_k * per_expert


def _stream_mixing(config: RunConfig, num_layers: int) -> int:
    """H_pre x, H_res x and H_post^T F(.) of both sub-layers of every layer; arXiv 2512.24880 equation 3."""
    streams, width = config.model.mhc.num_streams, config.model.hidden_size
    if streams == 1:
        return 0
    return num_layers * 2 * 2 * (streams * streams + 2 * streams) * width


def _engram(config: RunConfig) -> int:
    """Projections, gate and convolution of every Engram layer; arXiv 2601.07372 section 2.3."""
    engram = config.engram
    if engram is None:
        return 0
    channels = engram_streams(config) * config.model.hidden_size
    gate = 2 * 2 * channels if engram.gate else 0
    conv = 2 * engram.conv_kernel_size * channels if engram.conv else 0
    return _matrix_flops(config, "Engram dense") + len(engram.layer_numbers) * (gate + conv)


def _prediction(config: RunConfig) -> int:
    """Projection, one layer and the head again; arXiv 2412.19437 section 2.2. Of its routed experts, `top_k`."""
    model, moe = config.model, config.model.moe
    if model.mtp.num_layers == 0:
        return 0
    matrices = 0
    for spec in parameter_specs(config):
        if spec.part == "multi-token prediction" and len(spec.shape) == 2:
            share = moe.top_k / moe.num_experts if moe is not None and spec.placed_as == "routed experts" else 1
            matrices += round(2 * spec.count * share)
    return matrices + _attention_core(config, 1) + _stream_mixing(config, 1) + _matrix_flops(config, "output head")
