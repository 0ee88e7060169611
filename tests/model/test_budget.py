"""Pairs with and without Engram: equal budgets, reported to the parameter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from engram_megatron.config import EngramConfig, ParallelConfig, RunConfig
from engram_megatron.errors import UsageError
from engram_megatron.model.budget import EqualPair, engram_twin, moe_twin, removed_experts
from engram_megatron.model.counts import count_parameters
from engram_megatron.presets import dense_4b, engram_27b, engram_40b, engram_tiny, moe_27b


def _assert_equal(pair: EqualPair, total: float, activated: float) -> None:
    assert pair.moe.engram is None
    assert pair.engram.engram is not None
    assert pair.moe_counts == count_parameters(pair.moe)
    assert pair.engram_counts == count_parameters(pair.engram)
    assert -total * pair.moe_counts.total <= pair.total_difference <= 0
    assert abs(pair.activated_difference) <= activated * pair.moe_counts.activated
    pair.moe.validate()
    pair.engram.validate()


@pytest.mark.parametrize("build", [engram_tiny, engram_27b, engram_40b])
def test_moe_twin_has_the_budget_of_the_engram_model(build: Callable[[], RunConfig]) -> None:
    config = build()
    pair = moe_twin(config)
    _assert_equal(pair, total=1e-3, activated=5e-3)
    assert pair.engram.model == config.model  # only the table's rows move on that side
    assert pair.moe.model.moe is not None
    assert pair.moe.model.moe.num_experts % 2 == 0


def test_moe_twin_of_engram_27b_has_the_72_experts_of_the_paper() -> None:
    pair = moe_twin(engram_27b())
    assert pair.moe.model.moe is not None
    assert pair.moe.model.moe.num_experts == 72
    assert pair.sparse_ratio == pytest.approx(0.743, abs=1e-3)


def test_both_directions_are_inverse() -> None:
    config = engram_tiny()
    there = moe_twin(config)
    assert config.engram is not None
    assert config.model.moe is not None
    assert there.moe.model.moe is not None
    back = engram_twin(there.moe, config.engram, there.moe.model.moe.num_experts - config.model.moe.num_experts)
    assert back.engram.model == there.engram.model
    assert back.engram.engram == there.engram.engram


def test_engram_twin_solves_for_the_largest_tables_that_fit() -> None:
    pair = engram_twin(moe_27b(), EngramConfig(), removed_experts=17)
    _assert_equal(pair, total=1e-3, activated=5e-3)
    assert pair.engram.engram is not None
    next_prime = pair.engram.engram.rows_per_head + 1
    larger = replace(pair.engram, engram=replace(pair.engram.engram, rows_per_head=next_prime))
    assert count_parameters(larger).total > pair.moe_counts.total


def test_removed_experts_follow_the_sparse_ratio() -> None:
    moe = moe_27b()
    assert removed_experts(moe, 1.0) == 0
    assert removed_experts(moe, 0.0) == 66  # top_k = 6 stay
    assert removed_experts(moe, 0.75) == 16  # 6 + 0.75 * 66 = 55.5 stay, to an even number 56
    assert removed_experts(replace(moe, parallel=ParallelConfig(expert=8)), 0.75) == 16
    ratios = [
        engram_twin(moe, EngramConfig(), removed_experts(moe, ratio)).sparse_ratio for ratio in (0.4, 0.6, 0.75, 0.9)
    ]
    # an even number of experts is 2 / 66 of the budget; half of it, and Engram's dense part, may be missed
    assert ratios == pytest.approx([0.4, 0.6, 0.75, 0.9], abs=0.02)


def test_experts_of_the_twin_are_divisible_by_the_expert_ranks() -> None:
    config = replace(engram_tiny(), parallel=ParallelConfig(expert=8))
    pair = moe_twin(config)
    assert pair.moe.model.moe is not None
    assert pair.moe.model.moe.num_experts % 8 == 0
    _assert_equal(pair, total=1e-3, activated=5e-3)


def test_description_reports_both_differences() -> None:
    text = moe_twin(engram_tiny()).describe()
    assert "engram_tiny_moe_twin: total" in text
    assert "rho" in text.splitlines()[-1]


def test_impossible_exchanges_say_what_to_change() -> None:
    tiny, moe = engram_tiny(), moe_27b()
    assert tiny.engram is not None
    assert tiny.model.moe is not None
    with pytest.raises(UsageError, match="no mixture-of-experts layer"):
        engram_twin(dense_4b(), EngramConfig(), 1)
    with pytest.raises(UsageError, match="already has Engram"):
        engram_twin(tiny, tiny.engram, 2)
    with pytest.raises(UsageError, match="has no Engram"):
        moe_twin(moe)
    with pytest.raises(UsageError, match=r"leaves 5, fewer than model\.moe\.top_k = 6"):
        engram_twin(moe, EngramConfig(), 67)
    with pytest.raises(UsageError, match="remove more experts"):
        engram_twin(moe, EngramConfig(), 0)
    with pytest.raises(UsageError, match="leading dense layers can give back"):
        engram_twin(replace(tiny, engram=None), tiny.engram, 4)
    without_dense = replace(tiny.model, moe=replace(tiny.model.moe, num_leading_dense_layers=0))
    with pytest.raises(UsageError, match="set at least 1"):
        moe_twin(replace(tiny, model=without_dense))
    with pytest.raises(UsageError, match=r"must lie in 0\.\.1"):
        removed_experts(moe, 1.5)
