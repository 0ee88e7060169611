"""Collectives of activations: values per token that the modules of one layer exchange over tensor and context ranks.

Read off what megatron-core and this project issue, module by module, with sequence parallelism (wherever tensor > 1).
A value is one number of one token of the tensor that is whole after an all-gather, or before a reduce-scatter:

    column-parallel linear, input w wide    all-gather the input; backward all-gather it again for the gradient of the
                                            weights, reduce-scatter its own gradient
    row-parallel linear, output w wide      reduce-scatter the output; backward all-gather its gradient
    latents divided by width                all-gather the width, take this rank's positions; backward all-gather those
    rope key                                all-gather the positions; backward reduce-scatter
    latent keys and values, context         all-gather over the context ranks; backward reduce-scatter
"""

from __future__ import annotations

from dataclasses import astuple, dataclass

from engram_megatron.config import RunConfig
from engram_megatron.model.counts import engram_streams
from engram_megatron.model.placement import engram_layers_on, layers_on, moe_layers_on, mtp_layers_on


@dataclass(frozen=True)
class Exchange:
    """Values per token of all-gathers and reduce-scatters in the forward and the backward pass."""

    forward_gather: float = 0
    forward_scatter: float = 0
    backward_gather: float = 0
    backward_scatter: float = 0

    def __add__(self, other: Exchange) -> Exchange:
        return Exchange(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))

    def __mul__(self, factor: float) -> Exchange:
        return Exchange(*(value * factor for value in astuple(self)))

    def with_forward_again(self, again: bool) -> Exchange:
        """As it is where recomputation runs the forward pass once more."""
        if not again:
            return self
        return self + Exchange(forward_gather=self.forward_gather, forward_scatter=self.forward_scatter)

    @property
    def gather(self) -> float:
        """Of all-gathers."""
        return self.forward_gather + self.backward_gather

    @property
    def scatter(self) -> float:
        """Of reduce-scatters."""
        return self.forward_scatter + self.backward_scatter


def tensor_exchange(config: RunConfig, pipeline_rank: int) -> Exchange:
    """Over the tensor ranks, all layers of a pipeline rank with embedding and head; values per token of a context
    rank's share of the sequence (all T / context positions of it, not a tensor rank's slice)."""
    model, width = config.model, config.model.hidden_size
    mtp = mtp_layers_on(config, pipeline_rank)
    layers, moe_layers = len(layers_on(config, pipeline_rank)) + mtp, moe_layers_on(config, pipeline_rank)
    paired = layers if model.moe is None or model.moe.num_shared_experts else layers - moe_layers
    block = _attention(config).with_forward_again(recomputes(config, "attention")) * layers
    block += (_column(width) + _row(width)).with_forward_again(recomputes(config, "feed_forward")) * paired
    embeddings = (pipeline_rank == 0) + mtp
    heads = (pipeline_rank == config.parallel.pipeline - 1) + mtp
    embedding = Exchange(forward_scatter=width, backward_gather=width)
    projection = (_column(2 * width) + _divided_by_width(width)) * mtp
    return block + embedding * embeddings + _column(width) * heads + projection


def context_exchange(config: RunConfig, pipeline_rank: int) -> Exchange:
    """Over the context ranks, all layers of a pipeline rank: latents and rope keys, values per token of the T / tensor
    positions of which a tensor rank has the latents then."""
    attention = config.model.attention
    latents = attention.kv_lora_rank + attention.rope_head_dim
    layers = len(layers_on(config, pipeline_rank)) + mtp_layers_on(config, pipeline_rank)
    one = Exchange(forward_gather=latents, backward_scatter=latents)
    return one.with_forward_again(recomputes(config, "attention")) * layers


def halo_exchange(config: RunConfig, pipeline_rank: int) -> Exchange:
    """Over tensor and context ranks together: the tails of all pieces of a sequence, values per *sequence*."""
    engram, parallel = config.engram, config.parallel
    ranks = parallel.tensor * parallel.context
    if engram is None or not engram.conv or ranks == 1:
        return Exchange()
    pieces = ranks * (1 if parallel.context == 1 else 2)
    reach = (engram.conv_kernel_size - 1) * engram.max_ngram_order
    tail = min(reach, config.data.sequence_length // pieces)
    values = pieces * tail * engram_streams(config) * config.model.hidden_size
    one = Exchange(forward_gather=values, backward_scatter=values)
    return one.with_forward_again(recomputes(config, "engram")) * engram_layers_on(config, pipeline_rank)


def recomputes(config: RunConfig, module: str) -> bool:
    """Whether the forward pass of `module` (as in `training.recompute_modules`) runs a second time."""
    return config.training.recompute == "full" or module in config.training.recomputed_modules


def _column(width: int) -> Exchange:
    return Exchange(forward_gather=width, backward_gather=width, backward_scatter=width)


def _row(width: int) -> Exchange:
    return Exchange(forward_scatter=width, backward_gather=width)


def _divided_by_width(width: int) -> Exchange:
    return Exchange(forward_gather=width, backward_gather=width)


def _attention(config: RunConfig) -> Exchange:
    """MLA. Latent keys and values are projected up for the whole sequence on every context rank."""
    attention, width, context = config.model.attention, config.model.hidden_size, config.parallel.context
    rank, rope = attention.kv_lora_rank, attention.rope_head_dim
    queries = _column(width)
    if attention.query_lora_rank is not None:
        queries += _divided_by_width(attention.query_lora_rank) + _column(attention.query_lora_rank)
    whole_sequence = _column(rank) + Exchange(forward_gather=rope, backward_scatter=rope)
    return queries + _column(width) + _divided_by_width(rank + rope) + whole_sequence * context + _row(width)
