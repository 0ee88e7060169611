"""The matrix of layouts: what is in it, and that the selection leaves no pair of settings out."""

from __future__ import annotations

from itertools import chain, combinations, product
from typing import Any

from engram_megatron.layouts.matrix import LAYOUTS, VARIATIONS, all_cases, pairwise_cases, third_of
from engram_megatron.layouts.small_model import case_config
from engram_megatron.model.layout_rules import check_layout


def test_every_cell_is_a_layout_that_trains() -> None:
    for layout, variation in all_cases():
        config = case_config(layout, variation, "float64")
        config.validate()
        check_layout(config, layout.ranks)


def test_no_layout_is_there_twice() -> None:
    assert len({layout.name for layout in LAYOUTS}) == len(LAYOUTS) >= 24


def test_every_axis_occurs_alone_and_with_every_other_axis() -> None:
    def axes(layout: Any) -> frozenset[str]:
        data = layout.ranks // (layout.tensor * layout.pipeline * layout.context)
        sizes = {
            "tensor": layout.tensor,
            "pipeline": layout.pipeline,
            "expert": layout.expert,
            "context": layout.context,
            "data": data,
        }
        return frozenset(axis for axis, size in sizes.items() if size > 1)

    present = [axes(layout) for layout in LAYOUTS]
    names = ("tensor", "pipeline", "expert", "context", "data")
    for axis in names:
        alone = {axis, "data"} if axis == "expert" else {axis}  # expert ranks are taken from the others
        assert frozenset(alone) in present
    for pair in combinations(names, 2):
        assert any(set(pair) <= found for found in present), pair
    assert any(layout.virtual_pipeline > 1 for layout in LAYOUTS)
    assert max(layout.ranks for layout in LAYOUTS) == 8


def test_memory_stands_first_last_and_together_on_a_stage_and_some_stage_has_none() -> None:
    two_stages = {layout.memory_layers for layout in LAYOUTS if layout.pipeline == 2 and layout.virtual_pipeline == 1}
    # Four layers, two on each stage: (2, 3) are the last of one and the first of the next.
    assert {(2, 3), (1, 4), (1, 2), (3, 4)} <= two_stages


def test_selection_has_every_pair_of_settings() -> None:
    rows = [(layout, v.packed, v.recompute, v.mtp) for layout, v in pairwise_cases()]
    settings = [LAYOUTS, *({getattr(v, name) for v in VARIATIONS} for name in ("packed", "recompute", "mtp"))]
    for a, b in combinations(range(4), 2):
        met = {(row[a], row[b]) for row in rows}
        assert met == set(product(settings[a], settings[b]))
    assert set(pairwise_cases()) < set(all_cases())


def test_thirds_are_the_selection_and_each_has_every_layout_once() -> None:
    thirds = [third_of(pairwise_cases(), number) for number in (1, 2, 3)]
    assert sorted(map(repr, chain(*thirds))) == sorted(map(repr, pairwise_cases()))
    for third in thirds:
        assert [layout for layout, _ in third] == list(LAYOUTS)
        assert {variation.recompute for _, variation in third} == {"none", "selective", "full"}
