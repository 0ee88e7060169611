"""Which layouts a model can be trained in: the one place that states the rules, told before a process group is made."""

from __future__ import annotations

from engram_megatron.config import RunConfig
from engram_megatron.config_fields import check
from engram_megatron.model.pipeline_layout import pipeline_layout


def check_layout(config: RunConfig, world_size: int) -> None:
    """Raise `UsageError` where layout, batch, experts or sequence do not divide over `world_size` ranks.

    `config` has been validated.
    """
    data_ranks = config.parallel.data(world_size)
    num_microbatches = config.training.num_microbatches(data_ranks)
    _check_context(config)
    check_model_divides(config)
    parallel = config.parallel
    check(
        parallel.virtual_pipeline == 1 or num_microbatches % parallel.pipeline == 0,
        f"parallel.virtual_pipeline = {parallel.virtual_pipeline}: {num_microbatches} microbatches per step are not "
        f"divisible by parallel.pipeline = {parallel.pipeline}; change training.global_batch_size or "
        "training.micro_batch_size",
    )


def check_model_divides(config: RunConfig) -> None:
    """Raise `UsageError` where the tensors of the model cannot be divided as `config.parallel` says, on any machine."""
    _check_experts(config)
    for what, size in _divided_over_tensor_ranks(config).items():
        check(
            size % config.parallel.tensor == 0,
            f"{what} = {size} is not divisible by parallel.tensor = {config.parallel.tensor}",
        )
    _check_chunks(config)
    pipeline_layout(config)


def _check_experts(config: RunConfig) -> None:
    moe, expert = config.model.moe, config.parallel.expert
    if moe is None:
        check(expert == 1, f"parallel.expert = {expert}: this model has no experts (model.moe=none)")
        return
    check(
        moe.num_experts % expert == 0,
        f"model.moe.num_experts = {moe.num_experts} is not divisible by parallel.expert = {expert}",
    )


def _check_chunks(config: RunConfig) -> None:
    pipeline, chunks = config.parallel.pipeline, config.parallel.virtual_pipeline
    check(
        chunks == 1 or pipeline > 1,
        f"parallel.virtual_pipeline = {chunks} needs parallel.pipeline > 1: chunks of layers take turns on stages",
    )
    check(
        pipeline * chunks <= config.model.num_layers,
        f"parallel.pipeline * virtual_pipeline = {pipeline} * {chunks} = {pipeline * chunks} exceeds "
        f"model.num_layers = {config.model.num_layers}: every chunk needs a layer",
    )


def _check_context(config: RunConfig) -> None:
    """Under context parallelism a rank holds an early and a late piece of every sequence."""
    parallel, length = config.parallel, config.data.sequence_length
    pieces = 2 * parallel.context * parallel.tensor
    check(
        parallel.context == 1 or length % pieces == 0,
        f"data.sequence_length = {length} is not divisible by 2 * parallel.context * parallel.tensor = "
        f"2 * {parallel.context} * {parallel.tensor} = {pieces}",
    )


def _divided_over_tensor_ranks(config: RunConfig) -> dict[str, int]:
    """Every size of which a tensor rank holds its share. Routed experts are held whole."""
    model, attention, moe = config.model, config.model.attention, config.model.moe
    sizes = {
        "data.sequence_length": config.data.sequence_length,  # sequence parallelism comes with tensor > 1
        "model.vocab_size": model.vocab_size,
        "model.attention.num_heads": attention.num_heads,
        "model.attention.kv_lora_rank + rope_head_dim": attention.kv_lora_rank + attention.rope_head_dim,
    }
    if model.mtp.num_layers > 0:
        sizes["model.hidden_size"] = model.hidden_size  # the rows of its projection
    if attention.query_lora_rank is not None:
        sizes["model.attention.query_lora_rank"] = attention.query_lora_rank
    if moe is None or moe.num_leading_dense_layers > 0:
        sizes["model.dense_ffn_size"] = model.dense_ffn_size
    if moe is not None and moe.num_shared_experts > 0:
        sizes["model.moe.num_shared_experts * expert_ffn_size"] = moe.num_shared_experts * moe.expert_ffn_size
    return sizes
