"""Every tensor of a model from its `RunConfig` alone, and the parameter counts that the papers publish.

Names and shapes are those of the built megatron-core model on one rank (no tensor, pipeline or expert parallelism);
layers are numbered from 0 in names. No torch is imported, so that a dry run is cheap.

A multi-token prediction layer is listed as a part of its own, whatever stands in it: it is left out of inference, and
no paper counts it.

What the papers count (the numbers of arXiv 2601.07372 table 5 and arXiv 2512.24880 appendix A.1 close only this way):
- total: everything that is stored but multi-token prediction, less one of {token embedding, output head};
- activated: what multiplies a token's activations, without token embedding and head: attention, norms,
  hyper-connections, dense feed-forwards, routers, shared experts, `top_k` routed experts per MoE layer, and Engram's
  projections, norms and convolution. Looked-up table rows are not counted, as the token embedding's row is not;
- sparse ratio rho (section 3.1 of the Engram paper): of the inactive parameters P_sparse = P_tot - P_act, without both
  vocabulary matrices, the share that stands in routed experts; the rest stands in Engram tables.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from math import prod
from typing import Literal

from engram_megatron.config import EngramConfig, ModelConfig, MoEConfig, RunConfig
from engram_megatron.hashing.head_sizes import head_sizes

Part = Literal[
    "token embedding",
    "output head",
    "attention",
    "norms",
    "hyper-connections",
    "dense feed-forward",
    "router",
    "routed experts",
    "shared experts",
    "Engram dense",
    "Engram tables",
    "multi-token prediction",
]

TABLES_NAME = "engram.tables"
_MTP_LAYER = "mtp.layers.0.mtp_model_layer."
_Tensors = Iterator[tuple[str, tuple[int, ...], Part]]  # name within the layer, shape, part


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor: its global name, its whole shape, the part of the model that it belongs to, its layer from 0."""

    name: str
    shape: tuple[int, ...]
    part: Part
    layer: int | None = None  # None: outside the layers
    kind: Part | None = None  # of a tensor inside multi-token prediction: the part that its like belongs to elsewhere

    @property
    def placed_as(self) -> Part:
        """The part by whose rule ranks hold it."""
        return self.kind or self.part

    @property
    def count(self) -> int:
        """Number of elements."""
        return prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class ParameterCounts:
    """Parameters of one model; see the module's docstring for what the papers count."""

    by_part: dict[Part, int]  # stored, only parts that the model has
    inactive_experts: int  # in routed experts that a token does not use, over all layers

    @property
    def stored(self) -> int:
        """Everything, both vocabulary matrices, the tables and multi-token prediction included."""
        return sum(self.by_part.values())

    @property
    def total(self) -> int:
        """As the papers count: only one of {token embedding, output head}, no multi-token prediction."""
        return self.stored - self.by_part["token embedding"] - self.multi_token_prediction

    @property
    def multi_token_prediction(self) -> int:
        """The whole prediction layer; embedding and head are the model's."""
        return self.by_part.get("multi-token prediction", 0)

    @property
    def activated(self) -> int:
        """As the papers count: per token, neither token embedding nor output head nor table rows."""
        return self.total - self.by_part["output head"] - self.engram_tables - self.inactive_experts

    @property
    def engram_tables(self) -> int:
        """Elements of all Engram tables (primes included)."""
        return self.by_part.get("Engram tables", 0)

    @property
    def engram_dense(self) -> int:
        """Engram's projections, norms and convolution."""
        return self.by_part.get("Engram dense", 0)

    @property
    def sparse(self) -> int:
        """P_sparse = P_tot - P_act without vocabulary matrices: inactive experts and tables."""
        return self.inactive_experts + self.engram_tables

    @property
    def sparse_ratio(self) -> float | None:
        """rho within this model: the experts' share of `sparse`; None where nothing is inactive.

        1 - tables / `sparse` of the model without Engram differs from it by what Engram's dense parameters and the
        primes take: see `budget.EqualPair.sparse_ratio`.
        """
        return self.inactive_experts / self.sparse if self.sparse else None


def parameter_specs(config: RunConfig) -> Iterator[TensorSpec]:
    """Yield every torch parameter of the model, in the order of the modules. The tables are `table_spec`."""
    model = config.model
    yield TensorSpec("embedding.word_embeddings.weight", (model.vocab_size, model.hidden_size), "token embedding")
    for layer in range(model.num_layers):
        yield from _layer_specs(config, layer)
    yield TensorSpec("decoder.final_layernorm.weight", (model.hidden_size,), "norms")
    yield TensorSpec("output_layer.weight", (model.vocab_size, model.hidden_size), "output head")
    if model.mtp.num_layers > 0:
        yield from _prediction_specs(config)


def table_spec(config: RunConfig) -> TensorSpec | None:
    """All Engram tables as one matrix [rows of all layers, orders and heads, row_dim]; None without Engram.

    The tables are no torch parameters: their rows lie in host memory, sharded over all ranks.
    """
    if config.engram is None:
        return None
    return TensorSpec(TABLES_NAME, (table_rows(config.engram), config.engram.row_dim), "Engram tables")


def table_rows(engram: EngramConfig) -> int:
    """Rows of all head tables of all Engram layers."""
    per_order = (engram.rows_per_head,) * (engram.max_ngram_order - 1)
    return int(head_sizes(per_order, len(engram.layer_numbers), engram.num_heads_per_order).sum())


def tensor_specs(config: RunConfig) -> list[TensorSpec]:
    """Every torch parameter and, last, the tables."""
    tables = table_spec(config)
    return [*parameter_specs(config), *([] if tables is None else [tables])]


def buffer_specs(config: RunConfig) -> list[TensorSpec]:
    """Persistent buffers that training changes without a gradient: float32 biases of loss-free balancing."""
    moe = config.model.moe
    if moe is None:
        return []
    specs = [
        TensorSpec(f"decoder.layers.{layer}.mlp.router.expert_bias", (moe.num_experts,), "router", layer)
        for layer in range(moe.num_leading_dense_layers, config.model.num_layers)
    ]
    if has_mtp_experts(config.model):
        specs.append(TensorSpec(f"{_MTP_LAYER}mlp.router.expert_bias", (moe.num_experts,), "multi-token prediction"))
    return specs


def count_parameters(config: RunConfig) -> ParameterCounts:
    """Sum `tensor_specs` by part."""
    by_part: dict[Part, int] = {}
    for spec in tensor_specs(config):
        by_part[spec.part] = by_part.get(spec.part, 0) + spec.count
    moe = config.model.moe
    routed = by_part.get("routed experts", 0)
    inactive = 0 if moe is None else routed // moe.num_experts * (moe.num_experts - moe.top_k)
    return ParameterCounts(by_part=by_part, inactive_experts=inactive)


def num_moe_layers(model: ModelConfig) -> int:
    """Layers whose feed-forward is a mixture of experts."""
    return 0 if model.moe is None else model.num_layers - model.moe.num_leading_dense_layers


def has_mtp_experts(model: ModelConfig) -> bool:
    """Whether there is a multi-token prediction layer with experts: it is of the kind of the model's last layer."""
    return model.mtp.num_layers > 0 and num_moe_layers(model) > 0


def engram_streams(config: RunConfig) -> int:
    """Residual streams that one Engram layer reads and writes (S), each with a key projection of its own."""
    return config.model.mhc.num_streams if config.engram is not None and config.engram.multi_branch else 1


def _layer_specs(config: RunConfig, layer: int) -> Iterator[TensorSpec]:
    """The tensors of layer `layer` (from 0)."""
    model, engram, prefix = config.model, config.engram, f"decoder.layers.{layer}."
    has_experts = model.moe is not None and layer >= model.moe.num_leading_dense_layers
    parts = _decoder_layer(model, has_experts=has_experts)
    if engram is not None and layer + 1 in engram.layer_numbers:
        parts.append(_engram(engram, model.hidden_size, engram_streams(config)))
    for name, shape, kind in chain.from_iterable(parts):
        yield TensorSpec(prefix + name, shape, kind, layer)


def _prediction_specs(config: RunConfig) -> Iterator[TensorSpec]:
    """The tensors of the multi-token prediction layer; arXiv 2412.19437 section 2.2, equation 21."""
    model, prefix = config.model, "mtp.layers.0."
    for name in ("hidden_layernorm", "embedding_layernorm", "final_layernorm"):
        yield TensorSpec(f"{prefix}{name}.weight", (model.hidden_size,), "multi-token prediction", kind="norms")
    projection = (model.hidden_size, 2 * model.hidden_size)
    yield TensorSpec(f"{prefix}projection.weight", projection, "multi-token prediction")
    for name, shape, kind in chain.from_iterable(_decoder_layer(model, has_experts=has_mtp_experts(model))):
        yield TensorSpec(_MTP_LAYER + name, shape, "multi-token prediction", kind=kind)


def _decoder_layer(model: ModelConfig, *, has_experts: bool) -> list[_Tensors]:
    """A layer without memory."""
    parts = [_norms(model), _attention(model)]
    if model.moe is not None and has_experts:
        parts.append(_mixture(model.hidden_size, model.moe))
    else:
        parts.append(_feed_forward("mlp.", model.hidden_size, model.dense_ffn_size, "dense feed-forward"))
    if model.mhc.num_streams > 1:
        parts.append(_hyper_connections(model))
    return parts


def _norms(model: ModelConfig) -> _Tensors:
    yield "input_layernorm.weight", (model.hidden_size,), "norms"
    yield "pre_mlp_layernorm.weight", (model.hidden_size,), "norms"


def _attention(model: ModelConfig) -> _Tensors:
    """MLA: query (compressed or not), compressed keys and values, output; arXiv 2405.04434 section 2.1."""
    attention, width, prefix = model.attention, model.hidden_size, "self_attention."
    queries = attention.num_heads * (attention.nope_head_dim + attention.rope_head_dim)
    kv_rank = attention.kv_lora_rank
    if attention.query_lora_rank is None:
        yield prefix + "linear_q_proj.weight", (queries, width), "attention"
    else:
        yield prefix + "linear_q_down_proj.weight", (attention.query_lora_rank, width), "attention"
        yield prefix + "q_layernorm.weight", (attention.query_lora_rank,), "attention"
        yield prefix + "linear_q_up_proj.weight", (queries, attention.query_lora_rank), "attention"
    yield prefix + "linear_kv_down_proj.weight", (kv_rank + attention.rope_head_dim, width), "attention"
    yield prefix + "kv_layernorm.weight", (kv_rank,), "attention"
    keys_values = attention.num_heads * (attention.nope_head_dim + attention.value_head_dim)
    yield prefix + "linear_kv_up_proj.weight", (keys_values, kv_rank), "attention"
    yield prefix + "linear_proj.weight", (width, attention.num_heads * attention.value_head_dim), "attention"


def _feed_forward(prefix: str, width: int, ffn: int, part: Part) -> _Tensors:
    """SwiGLU: gate and up projections stacked in `linear_fc1`, down projection in `linear_fc2`."""
    yield prefix + "linear_fc1.weight", (2 * ffn, width), part
    yield prefix + "linear_fc2.weight", (width, ffn), part


def _mixture(width: int, moe: MoEConfig) -> _Tensors:
    yield "mlp.router.weight", (moe.num_experts, width), "router"
    for expert in range(moe.num_experts):
        yield from _feed_forward(f"mlp.experts.local_experts.{expert}.", width, moe.expert_ffn_size, "routed experts")
    if moe.num_shared_experts:
        shared_ffn = moe.num_shared_experts * moe.expert_ffn_size
        yield from _feed_forward("mlp.shared_experts.", width, shared_ffn, "shared experts")


def _hyper_connections(model: ModelConfig) -> _Tensors:
    """Per sub-layer: maps to pre (n), post (n) and residual (n*n) coefficients; arXiv 2512.24880 equation 7."""
    streams = model.mhc.num_streams
    coefficients = streams * streams + 2 * streams
    for name in ("mhc_attention", "mhc_mlp"):
        yield f"{name}.mapping.weight", (coefficients, streams * model.hidden_size), "hyper-connections"
        yield f"{name}.bias", (coefficients,), "hyper-connections"
        yield f"{name}.alpha", (3,), "hyper-connections"


def _engram(engram: EngramConfig, width: int, streams: int) -> _Tensors:
    """Fused key (one per stream) and value projections, gate norms, short convolution; arXiv 2601.07372 section 2.3."""
    outputs = (streams + 1 if engram.gate else 1) * width
    yield "engram.key_value.weight", (outputs, engram.memory_dim), "Engram dense"
    if engram.bias:
        yield "engram.key_value.bias", (outputs,), "Engram dense"
    if engram.gate:
        yield "engram.norm_query.weight", (streams, width), "Engram dense"
        yield "engram.norm_key.weight", (streams, width), "Engram dense"
    if engram.conv:
        yield "engram.norm_conv.weight", (streams, width), "Engram dense"
        yield "engram.short_conv.weight", (streams * width, 1, engram.conv_kernel_size), "Engram dense"
