"""Pairs of models with and without Engram that have equal total and equal activated parameters, as the papers count.

The comparison of arXiv 2601.07372 section 3.1: routed experts are removed, the freed parameters become table rows, and
a token activates as much as before. Three quantities close the two equations:
- routed experts, with `top_k` kept: the coarse step of the total;
- `dense_ffn_size` of the leading dense layers: absorbs what Engram's projections, norms and convolution activate
  (less the router rows of the removed experts), to the nearest multiple of 8 (and of `parallel.tensor`);
- `rows_per_head`: the fine step of the total, the largest whose prime-sized tables do not exceed it.
What is left over is reported by `EqualPair`. (The paper itself leaves the activated parameters 0.8 % apart.)
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil, lcm

from engram_megatron.config import EngramConfig, MoEConfig, RunConfig
from engram_megatron.config_fields import check
from engram_megatron.errors import UsageError
from engram_megatron.model.counts import ParameterCounts, count_parameters, num_moe_layers, table_rows

_FFN_MULTIPLE = 8  # widths of matrix products in 16-bit formats stay aligned
_SWIGLU_MATRICES = 3


@dataclass(frozen=True, kw_only=True)
class EqualPair:
    """Two runs with equal budgets and what is left of a difference, in parameters (Engram less MoE)."""

    moe: RunConfig
    engram: RunConfig
    moe_counts: ParameterCounts
    engram_counts: ParameterCounts

    @property
    def total_difference(self) -> int:
        """Of the totals as the papers count."""
        return self.engram_counts.total - self.moe_counts.total

    @property
    def activated_difference(self) -> int:
        """Of the activated parameters as the papers count."""
        return self.engram_counts.activated - self.moe_counts.activated

    @property
    def sparse_ratio(self) -> float:
        """rho of the pair: 1 - P_Engram / P_sparse, with the budget P_sparse of the model without Engram."""
        return 1 - self.engram_counts.engram_tables / self.moe_counts.sparse

    def describe(self) -> str:
        """Three lines: both models' counts and the relative differences."""
        lines = [
            f"{config.name}: total {counts.total:,}, activated {counts.activated:,}, tables {counts.engram_tables:,}"
            for config, counts in ((self.moe, self.moe_counts), (self.engram, self.engram_counts))
        ]
        total = self.total_difference / self.moe_counts.total
        activated = self.activated_difference / self.moe_counts.activated
        lines.append(f"Engram less MoE: total {total:+.4%}, activated {activated:+.4%}; rho {self.sparse_ratio:.2%}")
        return "\n".join(lines)


def moe_twin(engram: RunConfig, expert_multiple: int = 2) -> EqualPair:
    """The model without Engram that has the budget of `engram`: experts instead of tables.

    The number of experts is the multiple of `expert_multiple` and of `parallel.expert` nearest to the sparse budget;
    `engram` comes back with `rows_per_head` moved to meet the total of that number. Raises `UsageError`
    where `engram` has no Engram, no experts, or no leading dense layer.
    """
    moe = _experts(engram)
    check(engram.engram is not None, f"{engram.name} has no Engram: nothing to replace by experts")
    counts = count_parameters(engram)
    per_expert = counts.by_part["routed experts"] // moe.num_experts
    multiple = lcm(expert_multiple, engram.parallel.expert)
    num_experts = multiple * round((moe.top_k + counts.sparse / per_expert) / multiple)
    without = replace(_with_experts(engram, num_experts), name=f"{engram.name}_moe_twin", engram=None)
    without = _with_activated(without, counts.activated)
    return _pair(without, _with_total(engram, count_parameters(without).total))


def engram_twin(moe: RunConfig, engram: EngramConfig, removed_experts: int) -> EqualPair:
    """The model with Engram that has the budget of `moe`: `removed_experts` fewer experts per layer, tables instead.

    `engram.rows_per_head` is solved for; every other field is kept. Raises `UsageError` where `moe` already has Engram,
    fewer than `top_k` experts stay, the dense layers are too narrow to give back what Engram's dense parameters
    activate, or nothing is left for tables.
    """
    check(moe.engram is None, f"{moe.name} already has Engram; set engram=none first")
    experts = _experts(moe)
    left = experts.num_experts - removed_experts
    check(
        left >= experts.top_k,
        f"removing {removed_experts} of {experts.num_experts} experts leaves {left}, fewer than "
        f"model.moe.top_k = {experts.top_k}",
    )
    counts = count_parameters(moe)
    with_engram = replace(_with_experts(moe, left), name=f"{moe.name}_engram_twin", engram=engram)
    return _pair(moe, _with_total(_with_activated(with_engram, counts.activated), counts.total))


def paper_sparse_ratio(config: RunConfig) -> tuple[float, int]:
    """rho as the paper counts it, and the number of experts of the model that it is measured against.

    rho = 1 - tables / P_sparse, where P_sparse is the budget of inactive parameters of the *equal MoE*: the same
    backbone without Engram, with the whole number of experts whose total is nearest. Engram-27B against 72 experts:
    74.35 % (paper: 74.3 %). Its own inactive parameters give 74.32 %, because Engram's dense parameters and the
    primes cost a little too.
    """
    moe = config.model.moe
    assert moe is not None, "a dense model has no sparse ratio"
    without_engram = replace(config, engram=None)
    counts = count_parameters(without_engram)
    per_expert = counts.by_part["routed experts"] // moe.num_experts
    missing = count_parameters(config).total - counts.total
    num_experts = moe.num_experts + round(missing / per_expert)
    budget = per_expert * (num_experts - moe.top_k)
    return 1 - count_parameters(config).engram_tables / budget, num_experts


def removed_experts(moe: RunConfig, sparse_ratio: float, expert_multiple: int = 2) -> int:
    """Experts per layer to remove so that the rest holds `sparse_ratio` (rho) of the inactive parameters.

    The number that stays is the nearest multiple of `expert_multiple` and of `parallel.expert` not below `top_k`.
    """
    check(0 <= sparse_ratio <= 1, f"sparse ratio {sparse_ratio} must lie in 0..1")
    experts = _experts(moe)
    wanted = experts.top_k + sparse_ratio * (experts.num_experts - experts.top_k)
    multiple = lcm(expert_multiple, moe.parallel.expert)
    return experts.num_experts - multiple * max(ceil(experts.top_k / multiple), round(wanted / multiple))


def _experts(config: RunConfig) -> MoEConfig:
    """The mixture of a config whose experts and dense layers can be exchanged for tables."""
    moe = config.model.moe
    if moe is None or num_moe_layers(config.model) == 0:
        raise UsageError(f"{config.name} has no mixture-of-experts layer: there are no experts to exchange for tables")
    check(
        moe.num_leading_dense_layers > 0,
        f"model.moe.num_leading_dense_layers = 0 in {config.name}: no dense feed-forward can absorb the activated "
        "parameters of Engram's projections; set at least 1",
    )
    return moe


def _with_experts(config: RunConfig, num_experts: int) -> RunConfig:
    return replace(config, model=replace(config.model, moe=replace(_experts(config), num_experts=num_experts)))


def _with_activated(config: RunConfig, activated: int) -> RunConfig:
    """`config` with the `dense_ffn_size` whose activated parameters are nearest to `activated`."""
    model = config.model
    per_width = _SWIGLU_MATRICES * model.hidden_size * _experts(config).num_leading_dense_layers
    excess = count_parameters(config).activated - activated
    multiple = lcm(_FFN_MULTIPLE, config.parallel.tensor)
    width = multiple * round((model.dense_ffn_size - excess / per_width) / multiple)
    check(
        width > 0,
        f"{config.name} activates {excess:,} parameters too many, more than its leading dense layers can give back "
        f"({per_width:,} per unit of model.dense_ffn_size = {model.dense_ffn_size}); raise model.dense_ffn_size of the "
        "model without Engram or lower engram.memory_dim",
    )
    return replace(config, model=replace(model, dense_ffn_size=width))


def _with_total(config: RunConfig, total: int) -> RunConfig:
    """`config` with the largest `rows_per_head` whose total parameters do not exceed `total`."""
    engram = config.engram
    assert engram is not None, "only the side with Engram is solved for rows"
    counts = count_parameters(config)
    room = (total - counts.total + counts.engram_tables) // engram.row_dim
    low, high = 2, room // (engram.num_heads * len(engram.layer_numbers)) + 1  # heads have at least rows_per_head rows
    check(
        room >= table_rows(replace(engram, rows_per_head=low)),
        f"{config.name}: the removed experts leave room for {max(room, 0):,} table rows of {engram.row_dim}, fewer "
        f"than {engram.num_heads * len(engram.layer_numbers)} heads need; remove more experts",
    )
    while high - low > 1:
        middle = (low + high) // 2
        if table_rows(replace(engram, rows_per_head=middle)) <= room:
            low = middle
        else:
            high = middle
    return replace(config, engram=replace(engram, rows_per_head=low))


def _pair(moe: RunConfig, engram: RunConfig) -> EqualPair:
    return EqualPair(moe=moe, engram=engram, moe_counts=count_parameters(moe), engram_counts=count_parameters(engram))
