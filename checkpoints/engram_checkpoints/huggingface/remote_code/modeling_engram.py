"""Engram language models for `AutoModelForCausalLM`: latent attention, mixture of experts, residual streams mixed by
hyper-connections, and conditional memory at some layers.

A sequence may hold several documents, as in training: attention, n-grams and convolution start anew behind each
`config.document_end_token_id`. Positions that `attention_mask` hides belong to no document.

The cache is transformers' `DynamicCache`. Behind the layers' latents it has one more layer with the token ids so far
(n-grams reach back), and one for each Engram layer with its gates: the convolution reads earlier gated values, which
are a gate times what the token ids say.

Shape letters: B sequences, T new positions, Y positions of the cache and the new ones, X the last ones of those that
memory looks at, M streams, C hidden size.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from .configuration_engram import EngramConfig
from .layers_engram import FeedForward, LatentAttention, MixtureOfExperts, hyper_connection, merge, rotary_angles
from .memory_engram import EngramMemory, position_in_document


class MemoryInput:
    """What all Engram layers read: compressed ids and positions in documents [B, Y], and the cache."""

    def __init__(self, ids_BY: Tensor, position_BY: Tensor, cache: Any) -> None:
        self.ids_BY, self.position_BY, self.cache = ids_BY, position_BY, cache


class EngramDecoderLayer(nn.Module):
    """Memory, attention and feed-forward around the residual streams."""

    def __init__(self, config: EngramConfig, layer: int) -> None:
        super().__init__()
        self.config, width, streams = config, config.hidden_size, config.hc_mult
        ids = config.engram_layer_ids
        self.memory_cache_layer = config.num_hidden_layers + 1
        if layer in ids:
            self.engram = EngramMemory(config, ids.index(layer))
            self.memory_cache_layer += ids.index(layer)
        self.self_attn = LatentAttention(config, layer)
        has_experts = config.n_routed_experts > 0 and layer >= config.first_k_dense_replace
        self.mlp = MixtureOfExperts(config) if has_experts else FeedForward(width, config.intermediate_size)
        self.input_layernorm = nn.RMSNorm(width, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(width, eps=config.rms_norm_eps)
        if streams > 1:
            outputs = streams * streams + 2 * streams
            for name in ("hc_attn", "hc_ffn"):
                setattr(self, f"{name}_fn", nn.Parameter(torch.zeros(outputs, streams * width)))
                setattr(self, f"{name}_base", nn.Parameter(torch.zeros(outputs)))
                setattr(self, f"{name}_scale", nn.Parameter(torch.full((3,), 0.01)))

    def forward(
        self,
        streams_BTMC: Tensor,
        angles: tuple[Tensor, Tensor],
        mask_BTY: Tensor | None,
        memory: MemoryInput | None,
        cache: Any,
    ) -> Tensor:
        memory = memory if hasattr(self, "engram") else None
        fused = self.config.hc_mult > 1 and not self.config.engram_multi_branch
        if memory is not None and not fused:
            streams_BTMC = streams_BTMC + self._memory_update(streams_BTMC, memory)
        hidden_BTC, *mixing = self._read(streams_BTMC, "hc_attn")
        update_BTC = torch.zeros_like(hidden_BTC)
        if memory is not None and fused:
            update_BTC = self._memory_update(hidden_BTC.unsqueeze(2), memory).squeeze(2)
        normed_BTC = self.input_layernorm(hidden_BTC + update_BTC)
        output_BTC = self.self_attn(normed_BTC, angles, mask_BTY, cache) + update_BTC
        streams_BTMC = _write(streams_BTMC, output_BTC, mixing)
        hidden_BTC, *mixing = self._read(streams_BTMC, "hc_ffn")
        return _write(streams_BTMC, self.mlp(self.post_attention_layernorm(hidden_BTC)), mixing)

    def _read(self, streams_BTMC: Tensor, name: str) -> tuple[Tensor, ...]:
        """What a sub-layer reads, and with several streams what `merge` needs."""
        if self.config.hc_mult == 1:
            return (streams_BTMC.squeeze(2),)
        fn, base, scale = (getattr(self, f"{name}_{part}") for part in ("fn", "base", "scale"))
        iterations, eps = self.config.hc_sinkhorn_iters, self.config.rms_norm_eps
        return hyper_connection(streams_BTMC, fn, base, scale, iterations, eps)

    def _memory_update(self, hidden_BTMC: Tensor, memory: MemoryInput) -> Tensor:
        engram, T, Y = self.engram, hidden_BTMC.shape[1], memory.ids_BY.shape[1]
        before = min(Y - T, engram.reach)
        first = max(0, Y - T - before - (engram.order - 1))
        keeps_gates = memory.cache is not None and engram.reach > 0 and engram.has_gate
        past_gate = None
        if keeps_gates and before:
            past_gate = memory.cache.layers[self.memory_cache_layer].keys[:, 0, -before:]
        update_BTMC: Tensor
        update_BTMC, gate_BTM = engram(hidden_BTMC, memory.ids_BY[:, first:], memory.position_BY[:, first:], past_gate)
        if keeps_gates:
            _extend(memory.cache, self.memory_cache_layer, gate_BTM)
        return update_BTMC


def _write(streams_BTMC: Tensor, output_BTC: Tensor, mixing: list[Tensor]) -> Tensor:
    return merge(streams_BTMC, output_BTC, *mixing) if mixing else streams_BTMC + output_BTC.unsqueeze(2)


def _extend(cache: Any, layer: int, values: Tensor) -> Tensor:
    """Append values [B, T, ...] to a layer of the cache; all of them [B, Y, ...]."""
    while len(cache.layers) <= layer:
        cache.layers.append(DynamicLayer())
    keys: Tensor = values.unsqueeze(1)
    keys, _ = cache.layers[layer].update(keys, keys[..., :0])
    return keys.squeeze(1)


class EngramPreTrainedModel(PreTrainedModel):
    config_class = EngramConfig
    base_model_prefix = "model"
    _no_split_modules: ClassVar[list[str]] = ["EngramDecoderLayer"]
    _supports_sdpa = True
    _keep_in_fp32_modules_strict: ClassVar[list[str]] = [
        *("hc_attn_fn", "hc_attn_base", "hc_attn_scale", "hc_ffn_fn", "hc_ffn_base", "hc_ffn_scale"),
        "e_score_correction_bias",
    ]

    def __init__(self, config: EngramConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        layers = range(config.num_hidden_layers, config.num_hidden_layers + config.num_nextn_predict_layers)
        # Multi-token prediction trains the model and takes no part in inference.
        self._keys_to_ignore_on_load_unexpected = [rf"layers\.{layer}\." for layer in layers]


class EngramModel(EngramPreTrainedModel):
    """Hidden states from token ids."""

    def __init__(self, config: EngramConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([EngramDecoderLayer(config, layer) for layer in range(config.num_hidden_layers)])
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        if config.engram_layer_ids:  # token id -> compressed id
            self.engram_token_map = nn.Buffer(torch.zeros(config.vocab_size, dtype=torch.int64))
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: Any = None,
        use_cache: bool | None = None,
        **_unused: Any,
    ) -> BaseModelOutputWithPast:
        """`input_ids` [B, T] continue what `cache` holds; `attention_mask` [B, Y], 0 at padding, covers both."""
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if cache is not None and type(cache) is not DynamicCache:
            raise ValueError(f"Engram models generate with DynamicCache, not {type(cache).__name__}")
        if attention_mask is not None and attention_mask.dim() != 2:
            raise ValueError(
                f"attention_mask has {attention_mask.dim()} dimensions; give one of shape [batch, positions]"
            )
        T = input_ids.shape[1]
        tokens_BY = input_ids if cache is None else _extend(cache, self.config.num_hidden_layers, input_ids[..., None])
        tokens_BY = tokens_BY.view(input_ids.shape[0], -1)
        Y = tokens_BY.shape[1]
        hidden_BTC = self.embed_tokens(input_ids)
        angles = rotary_angles(self.config, Y - T, Y, hidden_BTC)
        documents_BY, sequence_BY = self._documents(tokens_BY, attention_mask)
        mask_BTY = _mask(documents_BY if self.config.separate_documents else sequence_BY, T)
        memory = None
        if self.config.engram_layer_ids:
            cut = documents_BY if self.config.engram_cut_at_documents else sequence_BY
            memory = MemoryInput(self.engram_token_map[tokens_BY], position_in_document(cut), cache)
        streams_BTMC = hidden_BTC.unsqueeze(2).repeat(1, 1, self.config.hc_mult, 1)
        for layer in self.layers:
            streams_BTMC = layer(streams_BTMC, angles, mask_BTY, memory, cache)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(streams_BTMC.mean(dim=2)), cache=cache)

    def _documents(self, tokens_BY: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Number of each position's document, and 0 for all: -1 where `attention_mask` hides a position."""
        sequence_BY = torch.zeros_like(tokens_BY)
        hidden = None if attention_mask is None else attention_mask.to(tokens_BY.device) == 0
        ends = torch.zeros_like(tokens_BY)
        if self.config.document_end_token_id is not None:
            ends[:, 1:] = tokens_BY[:, :-1] == self.config.document_end_token_id
            if hidden is not None:
                ends[:, 1:] &= ~hidden[:, :-1]
        documents_BY = ends.cumsum(dim=1)
        if hidden is not None:
            documents_BY, sequence_BY = (x.masked_fill(hidden, -1) for x in (documents_BY, sequence_BY))
        return documents_BY, sequence_BY


def _mask(documents_BY: Tensor, T: int) -> Tensor | None:
    """Boolean [B, T, Y]: which positions each new one sees. None: all before it, and there is no past."""
    Y = documents_BY.shape[1]
    if T == Y and bool((documents_BY == documents_BY[:, :1]).all()):
        return None
    causal = torch.ones(T, Y, dtype=torch.bool, device=documents_BY.device).tril(Y - T)
    return causal & (documents_BY[:, Y - T :, None] == documents_BY[:, None, :])


class EngramForCausalLM(EngramPreTrainedModel, GenerationMixin):
    """The model with its output head."""

    def __init__(self, config: EngramConfig) -> None:
        super().__init__(config)
        self.model = EngramModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: Any = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B, T, vocabulary] (of the last `logits_to_keep` positions, 0: all); see `EngramModel.forward`."""
        if kwargs.get("past_key_values") is not None:  # ignored, it would give wrong tokens
            raise ValueError("the cache is passed as `cache`; generate needs transformers 5.24 or later")
        outputs = self.model(input_ids, attention_mask, cache, use_cache)
        logits = self.lm_head(outputs.last_hidden_state[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, cache=outputs.cache)
