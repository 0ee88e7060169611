"""One layout in all its variations against one rank: what is run, and what must hold.

float64, two steps       loss, gradient norm, every gradient, updated parameters, rows and balancing biases: <= 1e-9
float32, five steps      drift from one rank in float64: at most `FLOAT32_FACTOR` times what one unit in the last place
                         of the weights does to one rank in float32
bfloat16, two steps      how far the loss is from one rank's: stated, not judged
two documents            packed in one sequence: the losses of the two alone (float64, <= 1e-9)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engram_megatron.layouts.compare import (
    Difference,
    DisagreementError,
    drift,
    largest_difference,
    live,
    moved_state,
    tokens_per_expert,
    whole_state,
    whole_table,
    whole_tensors,
)
from engram_megatron.layouts.matrix import Layout, Variation
from engram_megatron.layouts.records import Array, RankCell, RankRecord, Reference, StepRecord

FLOAT64_BOUND = 1e-9
# Sums in another order are roundings of the same size as a change of the weights' last bit; five steps of a nonlinear
# model (the root in Engram's gate has no bounded slope) enlarge both alike. A layout's drift is one more draw
# from the same kind of distribution, so the worst of a few draws needs a margin.
FLOAT32_DRAWS, FLOAT32_FACTOR = 3, 3.0
FLOAT64_STEPS, FLOAT32_STEPS, BFLOAT16_STEPS = 2, 5, 1


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a cell of the matrix showed. Differences are relative; see the module's docstring for the bounds."""

    layout: Layout
    variation: Variation
    loss: float
    documents: float | None  # loss of packed documents against the documents alone
    norm: float
    gradient: Difference
    update: Difference  # of parameters, rows and balancing biases
    float32_drift: float
    float32_bound: float
    bfloat16_loss: float

    @property
    def passes(self) -> bool:
        """All bounds hold."""
        exact = (self.loss, self.documents or 0.0, self.norm, self.gradient.value, self.update.value)
        return all(value <= FLOAT64_BOUND for value in exact) and self.float32_drift <= self.float32_bound


def judge(layout: Layout, variation: Variation, cells: Sequence[RankCell], reference: Reference) -> Outcome:
    """Compare what the ranks of a cell saw with one rank.

    Raises:
        DisagreementError: ranks differ in what they hold together, or a router chose other experts in float64 than one
            rank's (then the gradients of the two cannot be compared; the reference's closest choice was too close).
    """
    float64 = [cell.float64 for cell in cells]
    compared = [_compare_step(float64, [reference.float64], step) for step in range(FLOAT64_STEPS)]
    losses, norms, gradients, updates = zip(*compared, strict=True)
    return Outcome(
        layout=layout,
        variation=variation,
        loss=max(losses),
        documents=_documents(cells, reference),
        norm=max(norms),
        gradient=max(gradients),
        update=max(updates),
        float32_drift=_drift([cell.float32 for cell in cells], reference.float64),
        float32_bound=FLOAT32_FACTOR * max(_drift([record], reference.float64) for record in reference.float32),
        bfloat16_loss=max(
            abs(ours.loss / theirs.loss - 1)
            for ours, theirs in zip(cells[0].bfloat16.steps, reference.bfloat16.steps, strict=True)
        ),
    )


def _documents(cells: Sequence[RankCell], reference: Reference) -> float | None:
    if reference.loss_alone is None:
        return None
    losses = [cell.packed_loss for cell in cells if cell.packed_loss is not None]
    assert len(losses) == len(cells)
    return max(abs(loss / reference.loss_alone - 1) for loss in losses)


def _compare_step(
    records: Sequence[RankRecord], reference: Sequence[RankRecord], step: int
) -> tuple[float, float, Difference, Difference]:
    """(loss, norm, gradients, state after the step), largest relative difference over all ranks."""
    ours, (theirs,) = [record.steps[step] for record in records], [record.steps[step] for record in reference]
    for one in ours:
        if one.num_tokens != theirs.num_tokens:
            raise DisagreementError(f"step {step + 1} counts {one.num_tokens} tokens, one rank {theirs.num_tokens}")
    _check_routing(records, reference, step)
    gradients = [_gradients(steps, len(theirs.after.table.ids)) for steps in (ours, [theirs])]
    states = [whole_state([one.after for one in steps]) for steps in (ours, [theirs])]
    return (
        max(abs(one.loss / theirs.loss - 1) for one in ours),
        max(abs(one.gradient_norm / theirs.gradient_norm - 1) for one in ours),
        largest_difference(*gradients),
        largest_difference(*states),
    )


def _gradients(steps: Sequence[StepRecord], num_rows: int) -> dict[str, Array]:
    table = whole_table((step.table_gradients for step in steps), num_rows)
    return live(whole_tensors(step.gradients for step in steps)) | {"table": table}


def _drift(records: Sequence[RankRecord], reference: RankRecord) -> float:
    ours, theirs = (moved_state([record.end for record in of_ranks]) for of_ranks in (records, [reference]))
    return drift(ours, theirs, moved_state([reference.start]))


def _check_routing(records: Sequence[RankRecord], reference: Sequence[RankRecord], step: int) -> None:
    ours, theirs = tokens_per_expert(records, step), tokens_per_expert(reference, step)
    for layer in theirs:
        if not np.array_equal(ours.get(layer, ()), theirs[layer]):
            raise DisagreementError(
                f"step {step + 1}: layer {layer} sent {ours.get(layer)} tokens to its experts, one rank {theirs[layer]}"
            )
