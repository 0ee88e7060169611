"""A whole run small enough for a test: config, batches, and the objects that `training.run` would build on a rank.

Two layers of experts behind a dense one, four residual streams, Engram at layers 2 and 3, several documents per
sequence. The global batch of a step is the same for any number of ranks; each data replica takes two microbatches of
it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from engram_data.batch import Batch, make_batch
from engram_megatron.config import (
    AttentionConfig,
    DataConfig,
    EngramConfig,
    HyperConnectionConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    RunConfig,
    TrainingConfig,
)
from engram_megatron.layouts.small_model import take
from engram_megatron.overrides import apply_overrides

VOCAB, LENGTH, GLOBAL_BATCH, MICROBATCHES = 200, 24, 8, 2


def small_run_config(dtype: Literal["float32", "float64"] = "float64", overrides: Sequence[str] = ()) -> RunConfig:
    """Every number in `dtype`; `overrides` are those of the command line."""
    config = RunConfig(
        name="small",
        model=ModelConfig(
            num_layers=3,
            hidden_size=32,
            vocab_size=VOCAB,
            dense_ffn_size=48,
            init_std=0.1,
            attention=AttentionConfig(
                num_heads=2, kv_lora_rank=16, nope_head_dim=12, rope_head_dim=8, value_head_dim=12
            ),
            moe=MoEConfig(num_experts=4, top_k=2, num_shared_experts=1, expert_ffn_size=16, router_dtype=dtype),
            mhc=HyperConnectionConfig(num_streams=4, sinkhorn_iterations=6, mapping_dtype=dtype),
        ),
        engram=EngramConfig(
            layer_numbers=(2, 3),
            hash_seed_ids=(2, 3),
            num_heads_per_order=2,
            rows_per_head=101,
            memory_dim=16,
            block_rows=32,
            table_dtype=dtype,
        ),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=2, clip_grad_norm=0.5),
        data=DataConfig(sequence_length=LENGTH),
        training=TrainingConfig(num_steps=10, global_batch_size=GLOBAL_BATCH, dtype=dtype),
    )
    return apply_overrides(config, list(overrides))


def global_batch(step: int, *, separate_documents: bool = True) -> Batch:
    """The `GLOBAL_BATCH` sequences of a step: sequence s has s + 1 documents, so that ranks count different tokens, and
    all draw from a few frequent tokens, so that they ask for the same rows."""
    rng = np.random.default_rng(step)
    windows = np.minimum(rng.zipf(1.4, (GLOBAL_BATCH, LENGTH + 1)), VOCAB) - 1
    starts = [np.sort(rng.choice(np.arange(1, LENGTH + 1), s, replace=False)) for s in range(GLOBAL_BATCH)]
    return make_batch(list(windows), starts, separate_documents)


def microbatches(batch: Batch, data_rank: int, data_ranks: int) -> list[Batch]:
    """The `MICROBATCHES` consecutive pieces of a global batch that data replica `data_rank` of `data_ranks` takes."""
    size = GLOBAL_BATCH // data_ranks // MICROBATCHES
    first = data_rank * MICROBATCHES
    return [take(batch, slice(i * size, (i + 1) * size)) for i in range(first, first + MICROBATCHES)]


@dataclass(eq=False)
class SmallRun:
    """What `training.run` holds on a rank. `chunks` are wrapped in DDP; `memory` None: without Engram."""

    config: RunConfig
    ranks: Any
    chunks: Any
    optimizer: Any
    memory: Any
    trainer: Any


def build_small_run(config: RunConfig, rank: int, world_size: int, *, rough: bool = True) -> SmallRun:
    """Inside a rank function, once per process. `rough`: see `layouts.weights.roughen`."""
    from engram_megatron.layouts.weights import roughen
    from engram_megatron.model.backbone_config import TORCH_DTYPE
    from engram_megatron.model.builder import build_model_chunks, wrap_data_parallel
    from engram_megatron.optimizer.backbone import build_backbone_optimizer
    from engram_megatron.training.conditional_memory import ConditionalMemory
    from engram_megatron.training.trainer import Trainer

    size = GLOBAL_BATCH // config.parallel.data(world_size) // MICROBATCHES
    config = replace(config, training=replace(config.training, micro_batch_size=size))
    ranks = small_groups(config, rank, world_size)
    memory = None
    if config.engram is not None:
        memory = ConditionalMemory(config, small_hasher(config), ranks)
        memory.initialize(config.training.seed)
    chunks = build_model_chunks(config)
    if rough:
        roughen(chunks)
    distributed = config.parallel.distributed_optimizer
    wrapped = wrap_data_parallel(chunks, TORCH_DTYPE[config.training.dtype], distributed_optimizer=distributed)
    optimizer = build_backbone_optimizer(wrapped, config)
    return SmallRun(config, ranks, wrapped, optimizer, memory, Trainer(config, ranks, wrapped, optimizer, memory))


def small_groups(config: RunConfig, rank: int, world_size: int) -> Any:
    """Process groups on one thread per rank; those of an earlier run of this process are replaced."""
    from megatron.core import parallel_state

    from engram_megatron import platform
    from engram_megatron.training import parallel

    platform.limit_threads(1)
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    return parallel.initialize_groups(config, rank, world_size)


def small_hasher(config: RunConfig) -> Any:
    """The n-gram hasher without compression: the vocabulary here has no texts."""
    from engram_megatron.hashing.ngram_hasher import NgramHasher
    from engram_megatron.hashing.vocab_projection import identity_projection

    assert config.engram is not None
    return NgramHasher.from_config(config.engram, identity_projection(VOCAB), VOCAB)


def numbers(tensor: Any) -> np.ndarray[Any, Any]:
    """A copy in numpy."""
    copy: np.ndarray[Any, Any] = tensor.detach().cpu().numpy().copy()
    return copy
