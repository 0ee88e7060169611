"""Layouts that are refused, with both numbers, before any process group is made."""

from __future__ import annotations

import pytest
from small_run import small_run_config

from engram_megatron.errors import UsageError
from engram_megatron.model.layout_rules import check_layout


@pytest.mark.parametrize(("tensor", "expert", "world_size"), [(1, 1, 1), (2, 1, 2), (2, 4, 4), (4, 1, 4), (4, 2, 8)])
def test_sizes_that_divide_are_accepted(tensor: int, expert: int, world_size: int) -> None:
    overrides = [f"parallel.tensor={tensor}", f"parallel.expert={expert}", "model.attention.num_heads=4"]
    check_layout(small_run_config(overrides=overrides), world_size)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("data.sequence_length=26", "data.sequence_length = 26"),
        ("model.vocab_size=202", "model.vocab_size = 202"),
        ("model.attention.num_heads=6", "model.attention.num_heads = 6"),
        ("model.attention.kv_lora_rank=18", r"model.attention.kv_lora_rank \+ rope_head_dim = 26"),
        ("model.attention.query_lora_rank=10", "model.attention.query_lora_rank = 10"),
        ("model.dense_ffn_size=50", "model.dense_ffn_size = 50"),
        ("model.moe.expert_ffn_size=18", r"model.moe.num_shared_experts \* expert_ffn_size = 18"),
    ],
)
def test_size_that_tensor_ranks_cannot_share_is_named(override: str, told: str) -> None:
    overrides = ["model.attention.num_heads=4", "parallel.tensor=4", override]
    with pytest.raises(UsageError, match=f"{told} is not divisible by parallel.tensor = 4"):
        check_layout(small_run_config(overrides=overrides), 4)


def test_width_that_tensor_ranks_cannot_share_matters_to_multi_token_prediction_alone() -> None:
    overrides = ["model.attention.num_heads=4", "parallel.tensor=4", "model.hidden_size=30"]
    check_layout(small_run_config(overrides=overrides), 4)
    with pytest.raises(UsageError, match=r"model\.hidden_size = 30 is not divisible by parallel\.tensor = 4"):
        check_layout(small_run_config(overrides=[*overrides, "model.mtp.num_layers=1"]), 4)


@pytest.mark.parametrize(
    "unused", [("model.moe.num_leading_dense_layers=0", "model.dense_ffn_size=50"), ("model.moe.num_shared_experts=0",)]
)
def test_size_of_a_part_that_the_model_lacks_does_not_matter(unused: tuple[str, ...]) -> None:
    odd_experts = "model.moe.expert_ffn_size=18" if len(unused) == 1 else "model.moe.expert_ffn_size=16"
    overrides = ["model.attention.num_heads=4", "parallel.tensor=4", odd_experts, *unused]
    check_layout(small_run_config(overrides=overrides), 4)


@pytest.mark.parametrize(("context", "tensor", "world_size"), [(2, 1, 2), (4, 1, 4), (2, 2, 8), (2, 3, 6), (3, 1, 3)])
def test_sequence_that_context_ranks_can_share_is_accepted(context: int, tensor: int, world_size: int) -> None:
    sizes = [
        "model.attention.num_heads=6",
        "model.vocab_size=204",
        "model.moe.expert_ffn_size=18",
    ]  # what three tensor ranks can share
    overrides = [f"parallel.context={context}", f"parallel.tensor={tensor}", *sizes, "training.global_batch_size=8"]
    check_layout(small_run_config(overrides=overrides), world_size)


@pytest.mark.parametrize(("context", "tensor", "length"), [(2, 1, 26), (2, 2, 20), (4, 2, 24), (2, 3, 30)])
def test_sequence_that_context_ranks_cannot_share_is_named(context: int, tensor: int, length: int) -> None:
    overrides = [f"parallel.context={context}", f"parallel.tensor={tensor}", f"data.sequence_length={length}"]
    pieces = 2 * context * tensor
    told = rf"sequence_length = {length} is not divisible by 2 \* parallel.context \* parallel.tensor = .* = {pieces}$"
    with pytest.raises(UsageError, match=told):
        check_layout(small_run_config(overrides=overrides), context * tensor)


@pytest.mark.parametrize(
    ("overrides", "world_size", "told"),
    [
        (["parallel.virtual_pipeline=2"], 1, r"virtual_pipeline = 2 needs parallel.pipeline > 1"),
        (["parallel.pipeline=4"], 4, r"4 \* 1 = 4 exceeds model.num_layers = 3"),
        (
            ["parallel.pipeline=2", "parallel.virtual_pipeline=2", "model.num_layers=4", "training.micro_batch_size=8"],
            2,
            r"1 microbatches per step are not divisible by parallel.pipeline = 2",
        ),
        (["parallel.pipeline=2", "parallel.pipeline_layout=Et*3|L"], 2, r"part 2 has no layer"),
        (["parallel.pipeline=2", "parallel.pipeline_layout=Et*3|tL"], 2, r"has 4 layers, model.num_layers = 3"),
        (["parallel.pipeline=2", "parallel.pipeline_layout=Et|t|tL"], 2, r"has 3 parts"),
    ],
)
def test_pipeline_that_cannot_be_is_refused(overrides: list[str], world_size: int, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        check_layout(small_run_config(overrides=overrides), world_size)
