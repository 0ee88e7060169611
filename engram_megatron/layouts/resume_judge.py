"""One pair of layouts, A and B: what is run, and what must hold.

    A       steps 1 .. 4, saved after step 2                the unbroken run
    B       loads what A saved, saves it again, goes on
    A       loads what B saved, saves it again, goes on

All three checkpoints hold the same, bit for bit. A that went over B goes on bit for bit as if it had never been broken
off. B goes on as the unbroken run: in float32, its losses and its end are at most as far from the unbroken run's as
the layouts' table allows a layout to be from one rank, `FLOAT32_FACTOR` times what one unit in the last place of the
weights does to one rank; in bfloat16 the distance is stated, not judged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from engram_megatron.layouts.compare import drift, moved_state
from engram_megatron.layouts.judge import FLOAT32_FACTOR
from engram_megatron.layouts.records import RankRecord, State, StepRecord
from engram_megatron.layouts.resume_pairs import Pair

SAVED_STEP, LAST_STEP = 2, 4


@dataclass(frozen=True, kw_only=True)
class OneRank:
    """A run of one rank in float64, and the same in float32 from several last bits of the weights."""

    float64: RankRecord
    float32: list[RankRecord]


@dataclass(frozen=True, kw_only=True)
class PairRun:
    """What the ranks of A, of B, and of A again saw; the first also behind the steps that they have in common. And how
    many tensors A's checkpoint has, with the first of them, if any, that is another in what B and then A saved."""

    unbroken: Sequence[RankRecord]
    resumed: Sequence[RankRecord]
    back: Sequence[RankRecord]
    num_tensors: int
    changed_by_after: str | None
    changed_by_before: str | None

    @property
    def same(self) -> bool:
        """All that must be the same bit for bit."""
        return self.changed_by_after is None and self.changed_by_before is None and self.goes_on

    @property
    def goes_on(self) -> bool:
        """A that went over B saw what the unbroken run saw behind the save, on every rank and to the last bit."""
        return all(
            [(step.loss, step.gradient_norm) for step in _resumed(one)]
            == [(step.loss, step.gradient_norm) for step in _resumed(two)]
            and _same_state(one.end, two.end)
            for one, two in zip(self.back, self.unbroken, strict=True)
        )


@dataclass(frozen=True, kw_only=True)
class ResumeOutcome:
    """What a pair showed. Losses and drift are relative, see the module's docstring for their bounds."""

    pair: Pair
    run: PairRun
    loss: float
    loss_bound: float
    drift: float
    drift_bound: float

    @property
    def passes(self) -> bool:
        """All of it holds."""
        close = self.loss <= self.loss_bound and self.drift <= self.drift_bound
        return self.run.same and (close or self.pair.dtype == "bfloat16")


def judge_pair(pair: Pair, run: PairRun, one_rank: OneRank) -> ResumeOutcome:
    """Compare a pair's runs with the bounds that one rank gives."""
    loss, drift_ = distance(run.resumed, run.unbroken)
    draws = [distance([record], [one_rank.float64]) for record in one_rank.float32]
    loss_bound, drift_bound = (FLOAT32_FACTOR * max(values) for values in zip(*draws, strict=True))
    return ResumeOutcome(pair=pair, run=run, loss=loss, loss_bound=loss_bound, drift=drift_, drift_bound=drift_bound)


def distance(ours: Sequence[RankRecord], theirs: Sequence[RankRecord]) -> tuple[float, float]:
    """(loss, drift) of two runs of the same steps: the losses behind the save, the largest relative difference; and the
    end, relative to how far `theirs` went from its start to there."""
    start, end, other = (
        moved_state([record.start for record in theirs]),
        moved_state([record.end for record in theirs]),
        moved_state([record.end for record in ours]),
    )
    pairs = zip(_resumed(ours[0]), _resumed(theirs[0]), strict=True)
    return max(abs(one.loss / two.loss - 1) for one, two in pairs), drift(other, end, start)


def _resumed(record: RankRecord) -> list[StepRecord]:
    return record.steps[SAVED_STEP - LAST_STEP :]


def _same_state(ours: State, theirs: State) -> bool:
    if ours.parameters.keys() != theirs.parameters.keys() or ours.expert_bias.keys() != theirs.expert_bias.keys():
        return False
    arrays = chain(
        ((ours.parameters[name].values, shard.values) for name, shard in theirs.parameters.items()),
        ((ours.expert_bias[name], bias) for name, bias in theirs.expert_bias.items()),
        [(ours.table.ids, theirs.table.ids), (ours.table.values, theirs.table.values)],
    )
    return all(np.array_equal(one, two) for one, two in arrays)
