"""The order in which a pipeline rank works, and what follows from it: idle time and activations kept.

Orders are megatron-core's: one microbatch after another on one rank, 1F1B, and interleaved 1F1B (arXiv 2104.04473),
whose rank r of p goes ahead by 2 (p - r - 1) + (v - 1) p forward passes before it alternates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from engram_megatron.model.pipeline_balance import Cost


class Pass(NamedTuple):
    """One pass of a microbatch through chunk `chunk` of a pipeline rank."""

    forward: bool
    chunk: int
    microbatch: int


def rank_order(rank: int, ranks: int, chunks: int, microbatches: int) -> list[Pass]:
    """Every pass of pipeline rank `rank` in one step; `chunks`: those of one rank."""
    # Groups of `ranks` microbatches go through all chunks, one group after another; without interleaving groups do not
    # matter.
    groups = [range(first, min(first + ranks, microbatches)) for first in range(0, microbatches, ranks)]
    forward = [Pass(True, chunk, m) for group in groups for chunk in range(chunks) for m in group]
    backward = [Pass(False, chunk, m) for group in groups for chunk in reversed(range(chunks)) for m in group]
    ahead = ranks - rank - 1 if chunks == 1 else 2 * (ranks - rank - 1) + (chunks - 1) * ranks
    ahead = min(ahead, len(forward))
    alternating = [one for pair in zip(forward[ahead:], backward, strict=False) for one in pair]
    return forward[:ahead] + alternating + backward[len(forward) - ahead :]


def peak_kept(rank: int, ranks: int, microbatches: int, kept: Sequence[int]) -> int:
    """The largest sum of `kept[chunk]` over microbatches between their forward and their backward pass, in one step.

    `kept` has an entry for each chunk of the rank: with bytes of activations the answer is bytes, with ones it is the
    number of microbatch passes in flight.
    """
    now = peak = 0
    for one in rank_order(rank, ranks, len(kept), microbatches):
        now += kept[one.chunk] if one.forward else -kept[one.chunk]
        peak = max(peak, now)
    return peak


def idle_share(costs: Sequence[Cost], ranks: int, microbatches: int) -> float:
    """Mean share of the time from the first to the last pass of a step in which a pipeline rank does nothing.

    `costs` are those of all chunks in the order in which a microbatch visits them. Simulated without time for
    communication. With equal chunks it is (p - 1) / (v m + p - 1), p ranks, v chunks each, m microbatches.
    """
    chunks = len(costs) // ranks
    orders = [rank_order(rank, ranks, chunks, microbatches) for rank in range(ranks)]
    done: dict[tuple[bool, int, int], int] = {}  # (forward, place of the chunk, microbatch) to its end
    at, clock = [0] * ranks, [0] * ranks
    total = ranks * len(orders[0])
    while len(done) < total:
        before = len(done)
        for rank, order in enumerate(orders):
            while at[rank] < len(order):
                one = order[at[rank]]
                place = one.chunk * ranks + rank
                ready = _ready(done, one, place, len(costs))
                if ready is None:
                    break
                cost = costs[place].forward if one.forward else costs[place].backward
                clock[rank] = max(clock[rank], ready) + cost
                done[one.forward, place, one.microbatch] = clock[rank]
                at[rank] += 1
        assert len(done) > before, "a schedule in which every rank waits for another"
    work = microbatches * sum(cost.total for cost in costs)
    return 1 - work / (ranks * max(clock))


def _ready(done: dict[tuple[bool, int, int], int], one: Pass, place: int, places: int) -> int | None:
    """When the input of a pass is there; None: not yet known."""
    if one.forward:
        return 0 if place == 0 else done.get((True, place - 1, one.microbatch))
    if place == places - 1:
        return done.get((True, place, one.microbatch))
    return done.get((False, place + 1, one.microbatch))
