"""One block of an Engram model: memory, attention and feed-forward around M residual streams.

    X <- X + Engram(X, memory)                      at the chosen layers
    X <- H_res X + H_post^T Attention(norm(H_pre X))
    X <- H_res X + H_post^T FFN(norm(H_pre X))

Between blocks (and pipeline stages) the streams travel as one tensor [T, B, M*C]; the first block of the model expands
the embedding, the last one contracts; a multi-token prediction layer does both. The rows of memory reach the block as
megatron-core's cross-attention `context`, which `TransformerBlock` hands to every layer as an explicit tensor, so that
recomputation and interleaved microbatches cannot mix them up.

Under context and sequence parallelism (the latter wherever tensor > 1) a rank holds the T / (context * tensor)
positions of hidden states and memory that `sequence_partition` gives it; document ids are always those of the whole
sequence, which attention sees. All that stands here works on single positions; attention, feed-forward and the
convolution fetch what they need of others.

Shape legend: L Engram layers of this chunk, E memory width, others as in `hyper_connection`; T is this rank's share of
the sequence, except in document ids.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from megatron.core import parallel_state
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from megatron.core.utils import make_viewless_tensor
from torch import Tensor

from engram_megatron import platform
from engram_megatron.config import EngramConfig, HyperConnectionConfig
from engram_megatron.model.engram_layer import EngramLayer
from engram_megatron.model.hyper_connection import (
    HyperConnection,
    StreamMixing,
    contract_streams,
    expand_streams,
    stream_cosine,
)
from engram_megatron.model.recompute import (
    SubLayerCall,
    call,
    run_again,
    run_again_with_router,
    run_between_sub_layers_again,
)
from engram_megatron.model.sequence_partition import SequencePartition


@dataclass
class EngramSubmodules(TransformerLayerSubmodules):
    """megatron-core's submodules of a layer, and what this project adds."""

    mhc: HyperConnectionConfig = field(default_factory=HyperConnectionConfig)
    engram: EngramConfig | None = None
    memory_layers: tuple[int, ...] = ()  # numbers of this chunk's Engram layers, in the order of `context`
    recompute: frozenset[str] = frozenset()  # `training.recomputed_modules`; core attention alone is megatron-core's


class EngramTransformerLayer(TransformerLayer):
    """A decoder layer with hyper-connections and, at the layers that the config names, conditional memory."""

    def __init__(self, config: Any, submodules: EngramSubmodules, layer_number: int = 1, **kwargs: Any) -> None:
        super().__init__(config, submodules, layer_number, **kwargs)
        self.num_streams = submodules.mhc.num_streams
        engram = submodules.engram
        has_memory = self.layer_number in submodules.memory_layers
        self.memory_index = submodules.memory_layers.index(self.layer_number) if has_memory else None
        self.multi_branch = engram is not None and engram.multi_branch and self.num_streams > 1
        self.cut_at_documents = engram is not None and engram.cut_at_documents
        if engram is not None and has_memory:
            self.engram = _build_engram(engram, config, self.num_streams if self.multi_branch else 1)
        if self.num_streams > 1:
            self.mhc_attention = _build_mhc(submodules.mhc, config, self.layer_number)
            self.mhc_mlp = _build_mhc(submodules.mhc, config, self.layer_number)
        self.expands_streams = self.layer_number == 1 or self.is_mtp_layer
        self.contracts_streams = self.layer_number == config.num_layers or self.is_mtp_layer
        self.recompute = submodules.recompute
        self.rebuilds_streams = "mhc" in self.recompute and self.num_streams > 1
        self.last_stream_cosine: Tensor | None = None

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
        padding_mask: Tensor | None = None,
        **_unused: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """One block.

        Args:
            hidden_states: [T, B, C] at the model's first block, else [T, B, M*C].
            attention_mask: document ids int32 [B, T] for attention, or None.
            context: memory of the chunk's Engram layers [L, T, B, E], or None.
            context_mask: document ids int32 [B, T] for windows and convolution, or None.

        Returns:
            [T, B, M*C] ([T, B, C] after the model's last block), and `context` for the next block.
        """
        inputs = (hidden_states, attention_mask, context, context_mask, padding_mask)
        if self.rebuilds_streams:
            output = run_between_sub_layers_again(self._block, *inputs)
        else:
            output = self._block(call, *inputs)
        return make_viewless_tensor(output, requires_grad=True, keep_graph=True), context

    def _block(
        self,
        run: SubLayerCall,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        context: Tensor | None,
        context_mask: Tensor | None,
        padding_mask: Tensor | None,
    ) -> Tensor:
        """The streams (or their mean) after this block; attention, feed-forward and memory are called through `run`."""
        if self.expands_streams:
            hidden_states = expand_streams(hidden_states, self.num_streams)
        streams = hidden_states.unflatten(-1, (self.num_streams, -1))
        memory_TBE = None
        if self.memory_index is not None:
            assert context is not None, f"layer {self.layer_number} needs memory"
            memory_TBE = context[self.memory_index]
        if memory_TBE is not None and (self.multi_branch or self.num_streams == 1):
            streams = streams + self._memory_update(run, streams, memory_TBE, context_mask)
            memory_TBE = None
        streams = self._attention(run, streams, attention_mask, memory_TBE, context_mask)
        streams = self._feed_forward(run, streams, padding_mask)
        if self.num_streams > 1 and self.training:
            stride = max(1, streams.shape[0] // 16)  # a sample of positions is enough for a trend
            self.last_stream_cosine = stream_cosine(streams[stride // 2 :: stride])
        return contract_streams(streams) if self.contracts_streams else streams.flatten(-2)

    def _attention(
        self,
        run: SubLayerCall,
        streams: Tensor,
        documents: Tensor | None,
        memory_TBE: Tensor | None,
        memory_documents: Tensor | None,
    ) -> Tensor:
        """Attention as a sub-layer. `memory_TBE` is given in the ablation without multiple branches only: memory is
        then fused once, into the hidden state after H_pre, and reaches the streams with attention's output."""
        hidden, mixing = self.mhc_attention(streams) if self.num_streams > 1 else (streams.squeeze(-2), None)
        update = None
        if memory_TBE is not None:
            update = self._memory_update(run, hidden.unsqueeze(-2), memory_TBE, memory_documents).squeeze(-2)
            hidden = hidden + update
        output = run(self._attend, self.input_layernorm(hidden), documents)
        if update is not None:
            output = output + update
        return _write_back(streams, output, mixing)

    def _feed_forward(self, run: SubLayerCall, streams: Tensor, padding_mask: Tensor | None) -> Tensor:
        hidden, mixing = self.mhc_mlp(streams) if self.num_streams > 1 else (streams.squeeze(-2), None)
        output = run(self._transform, self.pre_mlp_layernorm(hidden), padding_mask)
        return _write_back(streams, output, mixing)

    def _memory_update(
        self, run: SubLayerCall, streams: Tensor, memory_TBE: Tensor, documents: Tensor | None
    ) -> Tensor:
        if "engram" not in self.recompute:
            return run(self.engram, streams, memory_TBE, documents)
        if self.rebuilds_streams:  # a part of what is computed again between the sub-layers
            return call(self.engram, streams, memory_TBE, documents)
        return run_again(self.engram, streams, memory_TBE, documents)

    def _attend(self, normed: Tensor, documents: Tensor | None) -> Tensor:
        """Attention; computed again, it keeps its input alone, and its gathers of latents are repeated."""
        if "attention" in self.recompute:
            return run_again(self._run_attention, normed, documents)
        return self._run_attention(normed, documents)

    def _run_attention(self, normed: Tensor, documents: Tensor | None) -> Tensor:
        output, bias = self.self_attention(normed, attention_mask=documents)
        assert bias is None, "Engram models have no bias in linear layers"
        return output  # type: ignore[no-any-return]

    def _transform(self, normed: Tensor, padding_mask: Tensor | None) -> Tensor:
        """The feed-forward: dense, or a mixture of experts, whose all-to-all is then repeated with it."""
        if "feed_forward" in self.recompute:
            return run_again_with_router(self._run_mlp, normed, padding_mask)
        return self._run_mlp(normed, padding_mask)

    def _run_mlp(self, normed: Tensor, padding_mask: Tensor | None) -> Tensor:
        extra = {"padding_mask": padding_mask} if self.is_moe_layer else {}
        output, bias = self.mlp(normed, **extra)
        assert bias is None, "Engram models have no bias in linear layers"
        return output  # type: ignore[no-any-return]


def _write_back(streams_TBMC: Tensor, output_TBC: Tensor, mixing: StreamMixing | None) -> Tensor:
    """The streams after a sub-layer; without hyper-connections (M = 1) a plain residual sum."""
    if mixing is None:
        return streams_TBMC + output_TBC.unsqueeze(-2)
    return mixing.merge(streams_TBMC, output_TBC)


def _build_mhc(mhc: HyperConnectionConfig, config: Any, layer_number: int) -> HyperConnection:
    return HyperConnection(
        mhc,
        hidden_size=config.hidden_size,
        home_stream=layer_number % mhc.num_streams,
        norm_eps=config.layernorm_epsilon,
        sequence_parallel=config.sequence_parallel,
    )


def _build_engram(engram: EngramConfig, config: Any, num_streams: int) -> EngramLayer:
    partition = SequencePartition(context=config.context_parallel_size, tensor=config.tensor_model_parallel_size)
    divided = partition.num_ranks > 1
    layer = EngramLayer(
        hidden_size=config.hidden_size,
        memory_dim=engram.memory_dim,
        num_streams=num_streams,
        conv_kernel_size=engram.conv_kernel_size,
        conv_dilation=engram.max_ngram_order,
        gate=engram.gate,
        conv=engram.conv,
        bias=engram.bias,
        norm_eps=engram.norm_eps,
        conv_norm_eps=engram.conv_norm_eps,
        init_std=config.init_method_std,
        dtype=config.params_dtype,
        device=platform.device(),
        partition=partition,
        sequence_group=parallel_state.get_tensor_and_context_parallel_group() if divided else None,
    )
    for parameter in layer.parameters():
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return layer
