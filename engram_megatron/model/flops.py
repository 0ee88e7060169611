"""FLOPs of one token from the config alone; the numerator of model FLOPs utilisation (MFU).

What is counted: 2 FLOPs per multiply-add of
- matrix products: attention projections, feed-forwards, router, shared and `top_k` routed experts, hyper-connection
  mappings, Engram's key and value projections, output head;
- causal attention, scores and weighted values, over half of the sequence (no token attends to later ones). Document
  boundaries inside a sequence are not deducted;
- the contractions that are no matrix products: mixing of residual streams (n*n + 2n multiply-adds per channel and
  sub-layer), Engram's gate (one dot product, one scaled addition per stream) and its short convolution;
- multi-token prediction: its layer, the projection of its input, and a second pass through the output head.
The backward pass is twice the forward pass: one product for the input's, one for the weights' gradient.

Not counted: norms, activations, softmax, rotary embedding, Sinkhorn iterations, hashing and table lookups, the
optimizer, and anything that recomputation does again (so MFU falls where activations are recomputed).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace

from engram_megatron.config import RunConfig
from engram_megatron.model.counts import Part, TensorSpec, engram_streams, parameter_specs

BACKWARD_PER_FORWARD = 2

Matrices = Counter[Part]  # elements of weight matrices by part


@dataclass(frozen=True, kw_only=True)
class TokenFlops:
    """FLOPs of the forward pass of one token, by kind."""

    attention_projections: int = 0
    attention_core: int = 0  # scores and weighted values, at the config's sequence length
    feed_forward: int = 0  # dense layers, shared and active routed experts
    router: int = 0
    hyper_connections: int = 0
    engram: int = 0
    head: int = 0
    multi_token_prediction: int = 0  # its layer, projection and head together

    @property
    def forward(self) -> int:
        """All kinds."""
        return sum(getattr(self, kind.name) for kind in fields(self))

    @property
    def forward_backward(self) -> int:
        """Forward and backward pass."""
        return (1 + BACKWARD_PER_FORWARD) * self.forward


def token_flops(config: RunConfig) -> TokenFlops:
    """FLOPs of one token of `config`, averaged over the positions of a sequence of `data.sequence_length`."""
    return _sum([*layer_flops(config), outer_flops(config)])


def layer_flops(config: RunConfig) -> list[TokenFlops]:
    """FLOPs of every decoder layer, from the first."""
    matrices: list[Matrices] = [Counter() for _ in range(config.model.num_layers)]
    for spec in _matrix_specs(config):
        if spec.layer is not None:
            matrices[spec.layer][spec.part] += spec.count
    engram_layers = () if config.engram is None else config.engram.layer_numbers
    return [_layer(config, of_layer, layer + 1 in engram_layers) for layer, of_layer in enumerate(matrices)]


def outer_flops(config: RunConfig) -> TokenFlops:
    """FLOPs outside the decoder's layers: the output head and multi-token prediction."""
    head = 2 * config.model.vocab_size * config.model.hidden_size
    if config.model.mtp.num_layers == 0:
        return TokenFlops(head=head)
    matrices: Matrices = Counter()
    for spec in _matrix_specs(config):
        if spec.part == "multi-token prediction":
            matrices[spec.placed_as] += spec.count
    layer = _layer(config, matrices, has_engram=False)
    projection = 2 * matrices["multi-token prediction"]
    return TokenFlops(head=head, multi_token_prediction=layer.forward + projection + head)


def _layer(config: RunConfig, matrices: Matrices, has_engram: bool) -> TokenFlops:
    """Every element of a weight matrix multiplies every token once."""
    engram = 2 * matrices["Engram dense"] + (_gate_and_conv(config) if has_engram else 0)
    return TokenFlops(
        attention_projections=2 * matrices["attention"],
        attention_core=_attention_core(config),
        feed_forward=_feed_forward(config, matrices),
        router=2 * matrices["router"],
        hyper_connections=2 * matrices["hyper-connections"] + _stream_mixing(config, matrices),
        engram=engram,
    )


def _matrix_specs(config: RunConfig) -> Iterable[TensorSpec]:
    return (spec for spec in parameter_specs(config) if len(spec.shape) == 2 and "norm" not in spec.name)


def _feed_forward(config: RunConfig, matrices: Matrices) -> int:
    """Dense, shared, and of the routed experts `top_k` out of all."""
    moe = config.model.moe
    routed = 0 if moe is None else matrices["routed experts"] * moe.top_k // moe.num_experts
    return 2 * (matrices["dense feed-forward"] + matrices["shared experts"] + routed)


def _attention_core(config: RunConfig) -> int:
    """One layer: query-key products over nope + rope channels and weighted values, half of the sequence on average."""
    attention = config.model.attention
    channels = attention.nope_head_dim + attention.rope_head_dim + attention.value_head_dim
    return attention.num_heads * channels * config.data.sequence_length


def _stream_mixing(config: RunConfig, matrices: Matrices) -> int:
    """One layer: H_pre x, H_res x and H_post^T F(.) of both sub-layers; arXiv 2512.24880 equation 3."""
    streams, width = config.model.mhc.num_streams, config.model.hidden_size
    return 2 * 2 * (streams * streams + 2 * streams) * width if matrices["hyper-connections"] else 0


def _gate_and_conv(config: RunConfig) -> int:
    """One Engram layer without its projections; arXiv 2601.07372 section 2.3."""
    assert config.engram is not None
    channels = engram_streams(config) * config.model.hidden_size
    gate = 2 * 2 * channels if config.engram.gate else 0
    conv = 2 * config.engram.conv_kernel_size * channels if config.engram.conv else 0
    return gate + conv


def _sum(parts: Iterable[TokenFlops]) -> TokenFlops:
    total = TokenFlops()
    for part in parts:
        total = replace(total, **{f.name: getattr(total, f.name) + getattr(part, f.name) for f in fields(part)})
    return total
