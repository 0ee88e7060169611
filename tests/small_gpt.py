"""A small megatron-core GPTModel (MLA, one dense and one MoE layer) for tests of the optimizer and of checkpoints."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.mappings import (
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.transformer_config import MLATransformerConfig

from engram_megatron.config import (
    AttentionConfig,
    HyperConnectionConfig,
    ModelConfig,
    MoEConfig,
    ParallelConfig,
    RunConfig,
    TrainingConfig,
)
from engram_megatron.config_optimizer import OptimizerConfig

TOKENS_PER_SEQUENCE = 16


def small_config(
    dtype: str = "float32", *, tensor: int = 1, expert: int = 1, distributed_optimizer: bool = False
) -> RunConfig:
    """Two layers, 4 experts, no Engram, no hyper-connections."""
    return RunConfig(
        name="small",
        model=ModelConfig(
            num_layers=2,
            hidden_size=32,
            vocab_size=64,
            dense_ffn_size=48,
            attention=AttentionConfig(
                num_heads=2, query_lora_rank=16, kv_lora_rank=16, nope_head_dim=12, rope_head_dim=8, value_head_dim=16
            ),
            moe=MoEConfig(num_experts=4, top_k=2, num_shared_experts=1, expert_ffn_size=24),
            mhc=HyperConnectionConfig(num_streams=1),
        ),
        engram=None,
        parallel=ParallelConfig(tensor=tensor, expert=expert, distributed_optimizer=distributed_optimizer),
        optimizer=OptimizerConfig(learning_rate=1e-2, adam_eps=1e-20),
        training=replace(TrainingConfig(), dtype=dtype),  # type: ignore[arg-type]
    )


def build_small_gpt(config: RunConfig) -> DistributedDataParallel:
    """This rank's model under DDP; weights depend on the global name alone, so every layout starts alike.

    Initialises megatron-core's parallel state where it is not; the default process group must be there.
    """
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=config.parallel.tensor,
            expert_model_parallel_size=config.parallel.expert,
            expert_tensor_parallel_size=1,
        )
    model_parallel_cuda_manual_seed(1234)
    megatron = _megatron_config(config)
    spec = get_gpt_decoder_block_spec(megatron, use_transformer_engine=False, normalization="RMSNorm")
    for layer in spec.layer_specs:
        layer.submodules.self_attention.module = _LatentAttention
        attention = layer.submodules.self_attention.submodules
        attention.core_attention = _SdpaAttention
        attention.q_layernorm = _RmsNorm
        attention.kv_layernorm = layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = _RmsNorm
    spec.layer_norm = _RmsNorm
    model = GPTModel(
        config=megatron,
        transformer_layer_spec=spec,
        vocab_size=config.model.vocab_size,
        max_sequence_length=TOKENS_PER_SEQUENCE,
        position_embedding_type="none",
        share_embeddings_and_output_weights=False,
    )
    with torch.no_grad():
        for name, parameter in global_parameters(model):
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            dim, ranks = sharding(parameter)
            shape = list(parameter.shape)
            shape[dim] *= ranks
            whole = torch.randn(shape, generator=generator, dtype=torch.float64) * 0.2 + (parameter.ndim == 1)
            parameter.copy_(tensor_parallel_shard(name, whole, dim, ranks))
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=config.training.dtype == "bfloat16",
        use_distributed_optimizer=config.parallel.distributed_optimizer,
    )
    return DistributedDataParallel(megatron, ddp, model)


def sharding(parameter: torch.nn.Parameter) -> tuple[int, int]:
    """(dimension, ranks over which it is sharded)."""
    is_expert = not getattr(parameter, "allreduce", True)  # sharded over the experts' tensor-parallel group: size 1
    if is_expert or not getattr(parameter, "tensor_model_parallel", False):
        return 0, 1
    return parameter.partition_dim, parallel_state.get_tensor_model_parallel_world_size()


def tensor_parallel_shard(name: str, whole: torch.Tensor, dim: int, ranks: int) -> torch.Tensor:
    """What this tensor-parallel rank holds of a global tensor: of gate and up rows each its share."""
    rank = parallel_state.get_tensor_model_parallel_rank() if ranks > 1 else 0
    parts = whole.chunk(2) if name.endswith("linear_fc1.weight") else (whole,)
    return torch.cat([part.chunk(ranks, dim=dim)[rank] for part in parts])


def global_parameters(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """(name with the global number of the expert, parameter)."""
    num_experts = getattr(model, "module", model).config.num_moe_experts
    for name, parameter in model.named_parameters():
        name = name.removeprefix("module.")
        if "local_experts." in name:
            head, tail = name.split("local_experts.")
            number, rest = tail.split(".", 1)
            ranks = parallel_state.get_expert_model_parallel_world_size()
            offset = parallel_state.get_expert_model_parallel_rank() * (num_experts // ranks)
            name = f"{head}local_experts.{int(number) + offset}.{rest}"
        yield name, parameter


def accumulate_gradients(model: DistributedDataParallel, seed: int, num_sequences: int = 4) -> float:
    """Backward of this data-parallel rank's share of `num_sequences` sequences; returns the mean loss of all tokens."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 64, (num_sequences, TOKENS_PER_SEQUENCE + 1), generator=generator)
    ranks, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    mine = tokens.chunk(ranks)[rank]
    positions = torch.arange(TOKENS_PER_SEQUENCE)[None].expand(len(mine), -1)
    losses = model(mine[:, :-1].contiguous(), positions, None, labels=mine[:, 1:].contiguous())
    losses.sum().backward()
    num_tokens = torch.tensor(losses.numel(), dtype=torch.int)
    finalize_model_grads([model], num_tokens)
    total = losses.detach().double().sum()
    torch.distributed.all_reduce(total, group=parallel_state.get_data_parallel_group())
    return float(total) / tokens[:, 1:].numel()


def train_steps(model: Any, optimizer: Any, first: int, last: int, lr: float) -> list[tuple[float, float]]:
    """(loss, squared gradient norm) of steps first..last-1, gradients halved."""
    numbers = []
    for step in range(first, last):
        optimizer.zero_grad()
        loss = accumulate_gradients(model, step)
        optimizer.prepare_gradients()
        numbers.append((loss, optimizer.gradient_norm_squared()))
        optimizer.step(lr, 0.5)
    return numbers


def _megatron_config(config: RunConfig) -> MLATransformerConfig:
    model, attention, moe = config.model, config.model.attention, config.model.moe
    assert moe is not None
    dtype = getattr(torch, config.training.dtype)
    return MLATransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=attention.num_heads,
        ffn_hidden_size=model.dense_ffn_size,
        q_lora_rank=attention.query_lora_rank,
        kv_lora_rank=attention.kv_lora_rank,
        qk_head_dim=attention.nope_head_dim,
        qk_pos_emb_head_dim=attention.rope_head_dim,
        v_head_dim=attention.value_head_dim,
        rope_type="rope",
        qk_layernorm=True,
        num_moe_experts=moe.num_experts,
        moe_router_topk=moe.top_k,
        moe_ffn_hidden_size=moe.expert_ffn_size,
        moe_shared_expert_intermediate_size=moe.expert_ffn_size,
        moe_router_load_balancing_type="none",
        moe_router_score_function="sigmoid",
        moe_router_enable_expert_bias=True,
        moe_router_dtype="fp64" if dtype is torch.float64 else "fp32",
        moe_token_dispatcher_type="alltoall",
        moe_layer_freq=[0] + [1] * (model.num_layers - 1),
        tensor_model_parallel_size=config.parallel.tensor,
        sequence_parallel=config.parallel.tensor > 1,
        expert_model_parallel_size=config.parallel.expert,
        expert_tensor_parallel_size=1,
        calculate_per_token_loss=True,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=F.silu,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        transformer_impl="local",
        bf16=dtype is torch.bfloat16,
    )


class _LatentAttention(MLASelfAttention):
    """megatron-core 0.19.2 loses gradient of the rope key under tensor parallelism: the key is gathered over ranks,
    every rank uses it for its own heads, and the gather's backward takes the own slice of the own heads' gradient.
    Handed over in the sequence-parallel layout, it takes the branch whose backward sums over ranks."""

    def _qkv_down_projection(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        query, key_value = super()._qkv_down_projection(hidden_states)
        if self.config.tensor_model_parallel_size > 1:
            key_value = scatter_to_sequence_parallel_region(gather_from_tensor_model_parallel_region(key_value))
        return query, key_value


class _RmsNorm(torch.nn.RMSNorm):
    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-6, **_: Any):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel


class _SdpaAttention(MegatronModule):
    """Causal attention whose keys and values may differ in width."""

    def __init__(self, config: Any, *_: Any, softmax_scale: float | None = None, **__: Any):
        super().__init__(config=config)
        self.scale = softmax_scale

    def forward(self, query: Any, key: Any, value: Any, attention_mask: Any, **_: Any) -> torch.Tensor:
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)
        return out.permute(2, 0, 1, 3).reshape(query.size(0), query.size(1), -1)
