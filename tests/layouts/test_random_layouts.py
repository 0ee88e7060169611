"""Layouts and shapes that nobody chose: refused with a rule, or equal to one rank. Never a hang, never a traceback."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from ranks import run_ranks

from engram_megatron import platform
from engram_megatron.config import RunConfig
from engram_megatron.errors import UsageError
from engram_megatron.layouts.compare import largest_difference, live, whole_state, whole_table, whole_tensors
from engram_megatron.layouts.records import Plan, RankRecord
from engram_megatron.layouts.small_model import small_model_config
from engram_megatron.model.layout_rules import check_layout
from engram_megatron.overrides import apply_overrides
from engram_megatron.training.plan import describe

BOUND = 1e-9  # see engram_megatron.layouts.case

SHAPES = {
    "model.num_layers": st.integers(2, 5),
    "model.hidden_size": st.sampled_from([16, 24, 40]),
    "model.attention.num_heads": st.sampled_from([2, 3, 4]),
    "model.attention.query_lora_rank": st.sampled_from(["none", "8", "12"]),
    "model.moe.num_experts": st.sampled_from([4, 6]),
    "model.moe.num_shared_experts": st.integers(0, 1),
    "model.moe.num_leading_dense_layers": st.integers(0, 2),
    "model.mhc.num_streams": st.sampled_from([1, 2, 4]),
    "model.mtp.num_layers": st.integers(0, 1),
    "engram.multi_branch": st.sampled_from(["true", "false"]),
    "engram.conv_kernel_size": st.integers(1, 4),
    "engram.rows_per_head": st.integers(30, 120),
    "tables.block_rows": st.sampled_from([7, 32, 1000]),
    "data.sequence_length": st.sampled_from([16, 24, 30, 32]),
    "data.separate_documents": st.sampled_from(["true", "false"]),
    "engram.cut_at_documents": st.sampled_from(["true", "false"]),
    "training.global_batch_size": st.sampled_from([4, 8]),
    "training.micro_batch_size": st.sampled_from([1, 2]),
}
LAYOUTS = {
    "parallel.tensor": st.integers(1, 4),
    "parallel.pipeline": st.integers(1, 4),
    "parallel.virtual_pipeline": st.integers(1, 3),
    "parallel.context": st.integers(1, 3),
    "parallel.expert": st.integers(1, 4),
    "parallel.distributed_optimizer": st.sampled_from(["true", "false"]),
}
RECOMPUTED = st.sampled_from(
    [
        ("none", ""),
        ("full", ""),
        ("selective", "mhc"),
        ("selective", "core_attention,engram"),
        ("selective", "attention,mhc"),
        ("selective", "feed_forward,mhc,engram"),
        ("full", "mhc"),
    ]
)
WITHOUT = st.sampled_from([(), (), (), ("model.moe=none",), ("engram=none",), ("engram=none", "model.moe=none")])
LAYOUT_TEXTS = st.sampled_from(
    ["auto", "auto", "Et|tL", "Ett|tL", "Et*2|tt|L", "E|tt|tL", "t|t", "Ettx|L", "Ett|t*2mL", ""]
)


@st.composite
def runs(draw: Any) -> tuple[RunConfig, int]:
    """(config, number of ranks), most of them impossible."""
    chosen = {key: draw(values) for key, values in (SHAPES | LAYOUTS).items()}
    chosen["parallel.pipeline_layout"] = draw(LAYOUT_TEXTS)
    layers = sorted(draw(st.sets(st.integers(1, chosen["model.num_layers"]), min_size=1, max_size=3)))
    numbers = ",".join(map(str, layers))
    chosen |= {"engram.layer_numbers": numbers, "engram.hash_seed_ids": numbers}
    chosen["training.recompute"], chosen["training.recompute_modules"] = draw(RECOMPUTED)
    overrides = [f"{key}={value}" for key, value in chosen.items()]
    config = apply_overrides(small_model_config("float64", overrides), list(draw(WITHOUT)))
    return config, draw(st.sampled_from([1, 2, 2, 4]))


def divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


@st.composite
def likely_runs(draw: Any) -> tuple[RunConfig, int]:
    """(config, number of ranks) whose axes multiply to the number of ranks; most of them train."""
    config, _ = draw(runs())
    ranks = draw(st.sampled_from([2, 4]))
    tensor = draw(st.sampled_from(divisors(ranks)))
    pipeline = draw(st.sampled_from(divisors(ranks // tensor)))
    context = draw(st.sampled_from(divisors(ranks // tensor // pipeline)))
    fitting = [
        f"parallel.tensor={tensor}",
        f"parallel.pipeline={pipeline}",
        f"parallel.virtual_pipeline={draw(st.integers(1, 2)) if pipeline > 1 else 1}",
        "parallel.pipeline_layout=auto",
        f"parallel.context={context}",
        f"parallel.expert={draw(st.sampled_from(divisors(ranks // pipeline)))}",
        "model.attention.num_heads=4",
        "data.sequence_length=32",
        "training.global_batch_size=4",
        "training.micro_batch_size=1",
    ]
    return apply_overrides(config, fitting), ranks


@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(runs())
def test_layout_is_accepted_or_refused_in_one_line(run: tuple[RunConfig, int]) -> None:
    config, ranks = run
    platform.install()
    from engram_megatron.model.backbone_config import backbone_config

    try:
        config.validate()
        check_layout(config, ranks)
    except UsageError as refusal:
        line = str(refusal)
        assert "\n" not in line
        assert any(key in line for key in ("parallel", "model.", "data.", "training.", "engram.")), line
    else:
        describe(config, ranks)
        backbone_config(config)  # megatron-core has rules of its own


def train(rank: int, world_size: int, config: RunConfig) -> RankRecord:
    from engram_megatron.layouts.rank_run import train_small_model

    return train_small_model(rank, world_size, config, Plan(num_steps=1, recorded_steps=1))


def gradients(records: list[RankRecord]) -> dict[str, Any]:
    steps = [record.steps[0] for record in records]
    num_rows = sum(len(record.end.table.ids) for record in records)
    table = whole_table((step.table_gradients for step in steps), num_rows)
    return live(whole_tensors(step.gradients for step in steps)) | {"table": table}


def check_equals_one_rank(config: RunConfig, ranks: int) -> None:
    plain = [
        *("parallel.tensor=1", "parallel.pipeline=1", "parallel.virtual_pipeline=1", "parallel.pipeline_layout=auto"),
        *("parallel.context=1", "parallel.expert=1", "parallel.distributed_optimizer=false"),
        *("training.recompute=none", "training.recompute_modules="),
    ]
    (alone,) = run_ranks(train, 1, apply_overrides(config, plain))
    records: list[RankRecord] = run_ranks(train, ranks, config)
    for record in records:
        assert record.steps[0].loss == pytest.approx(alone.steps[0].loss, rel=BOUND)
        assert record.steps[0].gradient_norm == pytest.approx(alone.steps[0].gradient_norm, rel=BOUND)
    assert largest_difference(gradients(records), gradients([alone])).value < BOUND
    states = [whole_state([r.steps[0].after for r in group]) for group in (records, [alone])]
    assert largest_difference(*states).value < BOUND


def accepted(config: RunConfig, ranks: int) -> bool:
    try:
        config.validate()
        check_layout(config, ranks)
    except UsageError:
        return False
    return True


# An example is some seconds: no shrinking, the first failure is told as it is.
UNHURRIED = {"deadline": None, "suppress_health_check": list(HealthCheck), "phases": (Phase.explicit, Phase.generate)}


@settings(max_examples=2, derandomize=True, **UNHURRIED)  # type: ignore[arg-type]
@given(likely_runs())
def test_accepted_layout_equals_one_rank(run: tuple[RunConfig, int]) -> None:
    config, ranks = run
    assume(accepted(config, ranks))
    check_equals_one_rank(config, ranks)


@pytest.mark.slow
@settings(max_examples=30, derandomize=True, **UNHURRIED)  # type: ignore[arg-type]
@given(likely_runs())
def test_accepted_layout_equals_one_rank_at_length(run: tuple[RunConfig, int]) -> None:
    config, ranks = run
    assume(accepted(config, ranks))
    check_equals_one_rank(config, ranks)
