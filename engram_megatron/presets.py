"""Whole runs by name. A variant calls another preset and replaces fields.

The numbers are those of the Engram paper's Table 5 (arXiv 2601.07372) and, for what it leaves out, of the mHC paper's
appendix A.1 (arXiv 2512.24880), whose 27B backbone is the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from engram_megatron.config import (
    AttentionConfig,
    CheckpointConfig,
    DataConfig,
    EngramConfig,
    HyperConnectionConfig,
    ModelConfig,
    MoEConfig,
    RunConfig,
    TrainingConfig,
)
from engram_megatron.config_optimizer import OptimizerConfig
from engram_megatron.config_tables import TablesConfig
from engram_megatron.errors import UsageError


def engram_27b() -> RunConfig:
    """Engram-27B: 55 routed experts and 5.792B table parameters at layers 2 and 15."""
    return RunConfig(
        name="engram_27b",
        model=ModelConfig(moe=MoEConfig(num_experts=55)),
        tables=TablesConfig(dtype="bfloat16"),
    )


def engram_40b() -> RunConfig:
    """Engram-40B: the 27B with 18.534B table parameters."""
    return replace(engram_27b(), name="engram_40b", engram=EngramConfig(rows_per_head=7239680))


def moe_27b() -> RunConfig:
    """MoE-27B: no Engram, 72 routed experts."""
    return replace(engram_27b(), name="moe_27b", engram=None, model=ModelConfig(moe=MoEConfig(num_experts=72)))


def dense_4b() -> RunConfig:
    """Dense-4B: no Engram, no experts."""
    return replace(moe_27b(), name="dense_4b", model=ModelConfig(moe=None))


def engram_tiny() -> RunConfig:
    """Every mechanism of the 27B at a size that two CPU cores train in minutes."""
    return RunConfig(
        name="engram_tiny",
        model=ModelConfig(
            num_layers=4,
            hidden_size=128,
            vocab_size=4096,
            dense_ffn_size=384,
            init_std=0.02,
            attention=AttentionConfig(
                num_heads=4, kv_lora_rank=32, nope_head_dim=32, rope_head_dim=16, value_head_dim=32
            ),
            moe=MoEConfig(num_experts=24, top_k=4, num_shared_experts=1, expert_ffn_size=96),
            mhc=HyperConnectionConfig(num_streams=4),
        ),
        engram=EngramConfig(
            layer_numbers=(2, 3),
            hash_seed_ids=(2, 3),
            num_heads_per_order=4,
            rows_per_head=8573,
            memory_dim=128,
        ),
        tables=TablesConfig(block_rows=2048),
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=20),
        data=DataConfig(sequence_length=192),
        checkpoint=CheckpointConfig(every_steps=150, keep_last=2),
        training=TrainingConfig(
            num_steps=300,
            global_batch_size=8,
            micro_batch_size=4,
            dtype="float32",
            validate_every_steps=60,
            validation_batches=8,
        ),
    )


def preset_names() -> tuple[str, ...]:
    """The names that `preset` takes."""
    return tuple(function.__name__ for function in _PRESETS)


def preset(name: str) -> RunConfig:
    """The preset called `name`; raises `UsageError` listing the known ones."""
    for function in _PRESETS:
        if function.__name__ == name:
            return function()
    raise UsageError(f"unknown preset {name!r}; known presets: {', '.join(preset_names())}")


_PRESETS: tuple[Callable[[], RunConfig], ...] = (dense_4b, moe_27b, engram_27b, engram_40b, engram_tiny)
