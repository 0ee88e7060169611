"""Layers dealt to chunks: against every possible partition, and for what the last chunk does besides."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import combinations, pairwise

import pytest

from engram_megatron.model.pipeline_balance import Cost, ModelCosts, balanced_layers, model_costs
from engram_megatron.model.pipeline_layout import pipeline_layout
from engram_megatron.overrides import apply_overrides
from engram_megatron.presets import preset


def _costs(layers: list[int], last: int = 0) -> ModelCosts:
    return ModelCosts(tuple(Cost(cost, 2 * cost) for cost in layers), Cost(last, 2 * last))


def _partitions(num_layers: int, chunks: int) -> Iterator[tuple[int, ...]]:
    for ends in combinations(range(1, num_layers), chunks - 1):
        bounds = (0, *ends, num_layers)
        yield tuple(end - start for start, end in pairwise(bounds))


def _totals(costs: ModelCosts, counts: tuple[int, ...]) -> list[int]:
    return [cost.total for cost in costs.chunks(counts)]


@pytest.mark.parametrize("chunks", [1, 2, 3, 5])
@pytest.mark.parametrize("seed", range(5))
def test_no_partition_has_a_faster_slowest_chunk_nor_as_fast_a_one_and_more_equal_chunks(
    seed: int, chunks: int
) -> None:
    rng = random.Random(seed)
    costs = _costs([rng.randint(1, 9) for _ in range(11)], rng.randint(0, 20))

    def worth(counts: tuple[int, ...]) -> tuple[int, int]:
        totals = _totals(costs, counts)
        return max(totals), sum(total * total for total in totals)

    best = min(worth(counts) for counts in _partitions(11, chunks))
    assert worth(balanced_layers(costs, chunks, 1)) == best


def test_earlier_chunks_take_fewer_of_equal_layers() -> None:
    assert balanced_layers(_costs([5] * 10), 4, 1) == (2, 2, 3, 3)


def test_head_takes_layers_from_the_last_chunk() -> None:
    assert balanced_layers(_costs([5] * 12, last=10), 2, 1) == (7, 5)
    assert balanced_layers(_costs([5] * 3, last=1000), 3, 1) == (1, 1, 1), "every chunk keeps a layer"


@pytest.mark.parametrize("seed", range(5))
def test_chunks_of_one_rank_even_each_other_out(seed: int) -> None:
    rng = random.Random(seed)
    costs = _costs([rng.randint(3, 6) for _ in range(20)], last=9)

    def slowest_rank(counts: tuple[int, ...]) -> int:
        totals = _totals(costs, counts)
        return max(sum(totals[rank::3]) for rank in range(3))

    alone, together = balanced_layers(costs, 6, 1), balanced_layers(costs, 3, 2)
    assert sum(together) == 20
    assert max(_totals(costs, together)) == max(_totals(costs, alone)), "the slowest chunk is as fast as can be"
    assert slowest_rank(together) <= slowest_rank(alone)


def test_costs_are_those_of_the_parts_that_a_layer_has() -> None:
    config = preset("engram_27b")
    costs = model_costs(config)
    plain, with_engram = costs.layers[4].total, costs.layers[1].total
    # Engram's projections [5 * 2560, 1280] and gate, and 25 * 2560 values of 2 bytes at 150 FLOPs each
    flops = 2 * 5 * 2560 * 1280 + 4 * 4 * 2560 + 2 * 4 * 4 * 2560
    assert with_engram - plain == 3 * (flops + 150 * 25 * 2560 * 2)
    full = model_costs(apply_overrides(config, ["training.recompute=full"]))
    assert full.layers[4].total * 3 == plain * 4, "one more forward pass"
    assert full.last == costs.last


def test_layout_of_the_paper_model_gives_the_head_its_due() -> None:
    config = apply_overrides(preset("engram_27b"), ["parallel.pipeline=4"])
    layout = pipeline_layout(config)
    assert layout.num_layers[-1] < min(layout.num_layers[:-1])
    costs = model_costs(config)
    totals = _totals(costs, layout.num_layers)
    assert max(totals) < 1.03 * sum(totals) / 4
    assert max(totals) < 0.95 * max(_totals(costs, (8, 7, 7, 8))), "an even split"
    again = apply_overrides(config, [f"parallel.pipeline_layout={layout.as_text()}"])
    assert pipeline_layout(again) == layout, "what is printed can be configured"
