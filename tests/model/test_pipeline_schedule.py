"""The order of passes of a pipeline rank, against megatron-core's own tables, and what follows from it."""

from __future__ import annotations

import pytest

from engram_megatron.model.pipeline_balance import Cost
from engram_megatron.model.pipeline_schedule import idle_share, peak_kept, rank_order

SHAPES = [(1, 1, 3), (2, 1, 5), (4, 1, 2), (4, 1, 9), (2, 2, 4), (2, 3, 2), (4, 2, 8), (4, 3, 4)]


@pytest.mark.parametrize(("ranks", "chunks", "microbatches"), SHAPES)
def test_order_is_that_of_megatron_core(ranks: int, chunks: int, microbatches: int) -> None:
    from engram_megatron import platform

    platform.install()
    from megatron.core.pipeline_parallel.schedules import get_schedule_table

    table = [(chunk, m) for m, chunk in get_schedule_table(microbatches, chunks, ranks)]
    for rank in range(ranks):
        order = rank_order(rank, ranks, chunks, microbatches)
        assert [(one.chunk, one.microbatch) for one in order if one.forward] == table
        backward = [(chunks - 1 - one.chunk, one.microbatch) for one in order if not one.forward]
        assert backward == table
        ahead = 2 * (ranks - rank - 1) + (chunks - 1) * ranks if chunks > 1 else ranks - rank - 1
        first_backward = [one.forward for one in order].index(False)
        assert first_backward == min(ahead + 1, len(table))


@pytest.mark.parametrize(("ranks", "chunks", "microbatches"), SHAPES)
def test_equal_chunks_idle_as_the_formula_says(ranks: int, chunks: int, microbatches: int) -> None:
    if microbatches < ranks:
        return  # the pipeline never fills; the formula is for full ones
    costs = [Cost(1, 2)] * (ranks * chunks)
    expected = (ranks - 1) / (chunks * microbatches + ranks - 1)
    assert idle_share(costs, ranks, microbatches) == pytest.approx(expected)


def test_a_slow_chunk_makes_the_others_wait() -> None:
    """Two ranks, the second twice as slow, many microbatches: the first one works half of the time."""
    assert idle_share([Cost(1, 2), Cost(2, 4)], 2, 500) == pytest.approx(0.25, abs=0.01)


def test_rank_keeps_what_it_ran_ahead() -> None:
    assert [peak_kept(rank, 4, 9, [10]) for rank in range(4)] == [40, 30, 20, 10]
    assert [peak_kept(rank, 4, 2, [10]) for rank in range(4)] == [20, 20, 20, 10]
    # 2 (p - r - 1) + (v - 1) p passes ahead and the one under way
    assert [peak_kept(rank, 4, 8, [1, 1]) for rank in range(4)] == [11, 9, 7, 5]
    # of the 5 passes of rank 3 the 4 oldest are of its first chunk
    assert peak_kept(3, 4, 8, [10, 1]) in range(41, 60)
