"""The table of `make layouts`: every cell against one rank, a line each."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from engram_megatron.layouts.compare import DisagreementError
from engram_megatron.layouts.forked_ranks import RanksError, run_ranks
from engram_megatron.layouts.judge import Outcome, judge
from engram_megatron.layouts.matrix import Layout, Variation
from engram_megatron.layouts.records import RankCell, Reference, StepChoices

TIMEOUT_S = 300.0  # of one cell; a hang ends with the stacks of all ranks

Cell = tuple[Layout, Variation]
HEADER = (
    f"{'layout':32} {'variation':35} {'loss':>8} {'packed':>8} {'norm':>8} {'gradient':>8} {'update':>8}   "
    f"{'fp32 drift':>10} {'bound':>8}  {'bf16 loss':>9}  {'s':>5}"
)


@dataclass(frozen=True)
class Line:
    """One line of the table and whether it is good."""

    text: str
    passes: bool
    float32_share: float = 0.0  # of its bound
    details: str = ""  # of a run that did not end: traceback and stacks of the ranks


def lines(matrix: Sequence[Cell]) -> Iterator[Line]:
    """Run the cells, layout by layout, and describe each as soon as it is done."""
    references: dict[tuple[tuple[int, int], bool, bool], Reference] = {}
    for layout, variation in matrix:
        started = time.monotonic()
        try:
            key = (layout.memory_layers, variation.packed, variation.mtp)
            if key not in references:
                references[key] = _reference(layout, variation)
            cells: list[RankCell] = run_ranks(
                run_cell, layout.ranks, layout, variation, references[key].float64.choices, timeout_s=TIMEOUT_S
            )
            outcome = judge(layout, variation, cells, references[key])
            line = _line(outcome, time.monotonic() - started)
        except DisagreementError as error:
            line = _failed(layout, variation, str(error))
        except RanksError as error:
            line = _failed(layout, variation, error.reason, str(error))
        yield line


def run_cell(
    rank: int, world_size: int, layout: Layout, variation: Variation, choices: Sequence[StepChoices]
) -> RankCell:
    """`case.run_cell`, imported on the rank: the process that prints the table stays without megatron-core."""
    from engram_megatron.layouts import case

    return case.run_cell(rank, world_size, layout, variation, choices)


def run_reference(rank: int, world_size: int, layout: Layout, variation: Variation) -> Reference:
    """`case.run_reference`, imported on the rank."""
    from engram_megatron.layouts import case

    return case.run_reference(rank, world_size, layout, variation)


def _reference(layout: Layout, variation: Variation) -> Reference:
    """One rank, nothing recomputed."""
    alone = Layout(1, memory_layers=layout.memory_layers)
    plain = Variation(variation.packed, "none", variation.mtp)
    (reference,) = run_ranks(run_reference, 1, alone, plain, timeout_s=TIMEOUT_S)
    assert isinstance(reference, Reference)
    return reference


def _failed(layout: Layout, variation: Variation, reason: str, details: str = "") -> Line:
    return Line(f"{layout.name:32} {variation.name:35} FAIL: {reason}", passes=False, details=details)


def _line(outcome: Outcome, seconds: float) -> Line:
    documents = "-" if outcome.documents is None else f"{outcome.documents:.1e}"
    text = (
        f"{outcome.layout.name:32} {outcome.variation.name:35} {outcome.loss:8.1e} {documents:>8} {outcome.norm:8.1e} "
        f"{outcome.gradient.value:8.1e} {outcome.update.value:8.1e}   {outcome.float32_drift:10.1e} "
        f"{outcome.float32_bound:8.1e}  {outcome.bfloat16_loss:9.1e}  {seconds:5.1f}"
    )
    if not outcome.passes:
        worst = max(outcome.gradient, outcome.update)
        text += f"  FAIL: {worst.where} differs most in float64"
    return Line(text, outcome.passes, outcome.float32_drift / outcome.float32_bound)
