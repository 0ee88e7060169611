"""A line of the table: good for a layout that is right, a failure for one that is not, with the reason."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from ranks import run_ranks

from engram_megatron.layouts.compare import DisagreementError
from engram_megatron.layouts.judge import judge
from engram_megatron.layouts.matrix import Layout, Variation
from engram_megatron.layouts.records import RankCell, RankRecord, Reference, Rows, StepRecord
from engram_megatron.layouts.table import lines, run_cell, run_reference

LAYOUT, VARIATION = Layout(2, tensor=2), Variation(packed=True, recompute="none", mtp=False)


@pytest.fixture(scope="module")
def reference() -> Reference:
    found: Reference = run_ranks(run_reference, 1, Layout(1), VARIATION)[0]
    return found


@pytest.fixture(scope="module")
def cells(reference: Reference) -> list[RankCell]:
    return run_ranks(run_cell, 2, LAYOUT, VARIATION, reference.float64.choices)


@pytest.mark.slow
def test_two_tensor_ranks_pass(cells: list[RankCell], reference: Reference) -> None:
    assert judge(LAYOUT, VARIATION, cells, reference).passes


def with_first_step(cells: list[RankCell], change: Any) -> list[RankCell]:
    def changed(record: RankRecord) -> RankRecord:
        first, *rest = record.steps
        return replace(record, steps=[change(first), *rest])

    return [replace(cell, float64=changed(cell.float64)) for cell in cells]


@pytest.mark.slow
def test_gradient_of_the_table_that_is_counted_twice_fails(cells: list[RankCell], reference: Reference) -> None:
    def doubled(step: StepRecord) -> StepRecord:
        return replace(step, table_gradients=Rows(step.table_gradients.ids, step.table_gradients.values * 2))

    outcome = judge(LAYOUT, VARIATION, with_first_step(cells, doubled), reference)
    assert not outcome.passes
    assert outcome.gradient == (pytest.approx(1.0), "table")


@pytest.mark.slow
def test_norm_that_is_off_in_the_ninth_digit_fails(cells: list[RankCell], reference: Reference) -> None:
    def longer(step: StepRecord) -> StepRecord:
        return replace(step, gradient_norm=step.gradient_norm * (1 + 2e-9))

    assert not judge(LAYOUT, VARIATION, with_first_step(cells, longer), reference).passes


@pytest.mark.slow
def test_other_experts_than_one_rank_chose_are_told(cells: list[RankCell], reference: Reference) -> None:
    def moved(step: StepRecord) -> StepRecord:
        return replace(step, tokens_per_expert={n: counts[::-1] for n, counts in step.tokens_per_expert.items()})

    with pytest.raises(DisagreementError, match="tokens to its experts"):
        judge(LAYOUT, VARIATION, with_first_step(cells, moved), reference)


def test_layout_that_cannot_train_is_a_line_with_its_rule() -> None:
    (line,) = lines([(Layout(2, tensor=2, expert=3), VARIATION)])
    assert not line.passes
    assert "is not divisible by expert = 3" in line.text
    assert "Traceback" in line.details
