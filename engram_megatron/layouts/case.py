"""What the ranks of one cell of the matrix run: see `judge` for what must hold."""

from __future__ import annotations

from collections.abc import Sequence

from engram_megatron.config_fields import DType
from engram_megatron.layouts.documents import loss_alone, packed_loss
from engram_megatron.layouts.judge import BFLOAT16_STEPS, FLOAT32_DRAWS, FLOAT32_STEPS, FLOAT64_STEPS
from engram_megatron.layouts.matrix import Layout, Variation
from engram_megatron.layouts.rank_run import train_small_model
from engram_megatron.layouts.records import Plan, RankCell, RankRecord, Reference, StepChoices
from engram_megatron.layouts.small_model import case_config


def run_cell(
    rank: int, world_size: int, layout: Layout, variation: Variation, choices: Sequence[StepChoices]
) -> RankCell:
    """On one rank of `layout`. `choices`: the reference's experts, replayed in float32."""

    def run(dtype: DType, plan: Plan) -> RankRecord:
        return train_small_model(rank, world_size, case_config(layout, variation, dtype), plan)

    packed = packed_loss(rank, world_size, case_config(layout, variation, "float64")) if variation.packed else None
    return RankCell(
        float64=run("float64", Plan(num_steps=FLOAT64_STEPS, recorded_steps=FLOAT64_STEPS)),
        float32=run("float32", Plan(num_steps=FLOAT32_STEPS, choices=choices)),
        bfloat16=run("bfloat16", Plan(num_steps=BFLOAT16_STEPS)),
        packed_loss=packed,
    )


def run_reference(rank: int, world_size: int, layout: Layout, variation: Variation) -> Reference:
    """On the only rank of `layout`."""
    assert layout.ranks == 1

    def run(dtype: DType, plan: Plan) -> RankRecord:
        return train_small_model(rank, world_size, case_config(layout, variation, dtype), plan)

    alone = loss_alone(rank, world_size, case_config(layout, variation, "float64")) if variation.packed else None
    float64 = run("float64", Plan(num_steps=FLOAT32_STEPS, recorded_steps=FLOAT64_STEPS, record_choices=True))
    draws = range(FLOAT32_DRAWS + 1)
    return Reference(
        float64=float64,
        float32=[run("float32", Plan(num_steps=FLOAT32_STEPS, choices=float64.choices, jitter=d)) for d in draws],
        bfloat16=run("bfloat16", Plan(num_steps=BFLOAT16_STEPS)),
        loss_alone=alone,
    )
