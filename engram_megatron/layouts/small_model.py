"""The model that all layouts train, and its batches: small, but with everything that a layout could get wrong.

Four layers (one dense, three of experts), four residual streams, two Engram layers, packed documents whose number
differs from sequence to sequence, frequent rows that all ranks ask for. Shape letters: B sequences, T positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from engram_data.batch import Batch, make_batch
from engram_megatron.config import (
    AttentionConfig,
    DataConfig,
    EngramConfig,
    HyperConnectionConfig,
    ModelConfig,
    MoEConfig,
    RunConfig,
    TrainingConfig,
)
from engram_megatron.config_fields import DType
from engram_megatron.config_optimizer import OptimizerConfig
from engram_megatron.config_tables import TablesConfig
from engram_megatron.hashing.ngram_hasher import NgramHasher
from engram_megatron.hashing.vocab_projection import identity_projection
from engram_megatron.layouts.matrix import Layout, Variation
from engram_megatron.overrides import apply_overrides

VOCAB, LENGTH, GLOBAL_BATCH = 192, 32, 4


def small_model_config(dtype: DType, overrides: Sequence[str] = ()) -> RunConfig:
    """One sequence per microbatch, so that every layout has several. Numbers that a wider type would hide (tables,
    mHC, router) are in float64 with the model, in float32 otherwise; `overrides` are those of the command line."""
    wide: Literal["float32", "float64"] = "float64" if dtype == "float64" else "float32"
    config = RunConfig(
        name="layouts",
        model=ModelConfig(
            num_layers=4,
            hidden_size=32,
            vocab_size=VOCAB,
            dense_ffn_size=48,
            init_std=0.1,
            attention=AttentionConfig(
                num_heads=4, kv_lora_rank=16, nope_head_dim=12, rope_head_dim=8, value_head_dim=12
            ),
            moe=MoEConfig(num_experts=4, top_k=2, num_shared_experts=1, expert_ffn_size=16, router_dtype=wide),
            mhc=HyperConnectionConfig(num_streams=4, sinkhorn_iterations=6, mapping_dtype=wide),
        ),
        engram=EngramConfig(
            layer_numbers=(2, 3),
            hash_seed_ids=(2, 3),
            num_heads_per_order=2,
            rows_per_head=101,
            memory_dim=16,
        ),
        tables=TablesConfig(dtype=wide, block_rows=32),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=2, clip_grad_norm=0.5),
        data=DataConfig(sequence_length=LENGTH),
        training=TrainingConfig(num_steps=10, global_batch_size=GLOBAL_BATCH, micro_batch_size=1, dtype=dtype),
    )
    return apply_overrides(config, list(overrides))


def case_config(layout: Layout, variation: Variation, dtype: DType) -> RunConfig:
    """The run of one cell of the matrix."""
    overrides = [*layout.overrides(), *variation.overrides()]
    if variation.mtp and layout.pipeline_layout != "auto":
        overrides.append(f"parallel.pipeline_layout={layout.pipeline_layout.removesuffix('L')}mL")
    return small_model_config(dtype, overrides)


def global_batch(step: int, config: RunConfig) -> Batch:
    """The sequences of a step: sequence s has s + 1 documents."""
    sequences, length = config.training.global_batch_size, config.data.sequence_length
    rng = np.random.default_rng(step)
    windows = np.minimum(rng.zipf(1.4, (sequences, length + 1)), config.model.vocab_size) - 1
    starts = [np.sort(rng.choice(np.arange(1, length + 1), s, replace=False)) for s in range(sequences)]
    return make_batch(list(windows), starts, config.data.separate_documents)


def take(batch: Batch, sequences: slice) -> Batch:
    """Some sequences of a batch."""
    return Batch(
        tokens=batch.tokens[sequences],
        labels=batch.labels[sequences],
        loss_mask=batch.loss_mask[sequences],
        document_ids=batch.document_ids[sequences],
    )


def microbatches(batch: Batch, size: int, data_rank: int, data_ranks: int) -> list[Batch]:
    """The microbatches of `size` sequences that data replica `data_rank` of `data_ranks` takes of a global batch."""
    share = len(batch.tokens) // data_ranks
    first = data_rank * share
    return [take(batch, slice(at, at + size)) for at in range(first, first + share, size)]


def hasher_of(config: RunConfig) -> NgramHasher:
    """The n-gram hasher without compression: this vocabulary has no texts."""
    assert config.engram is not None
    vocab_size = config.model.vocab_size
    return NgramHasher.from_config(config.engram, identity_projection(vocab_size), vocab_size)
