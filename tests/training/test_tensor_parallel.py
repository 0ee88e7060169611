"""Whole runs with the model divided over 2 and 4 tensor ranks, alone and with data and expert parallelism, against one
process that holds everything: loss, clip norm, every gradient, three optimizer steps, and how many rows are asked for.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pytest
from dense_run import dense_run, largest_difference, relative_difference, whole_table
from layout_run import FLOAT64, check_steps, train
from ranks import run_ranks, slow_above_two
from small_run import LENGTH, global_batch, small_run_config

from engram_megatron.layouts.compare import live, whole_tensors

STEPS = 3


class Layout(NamedTuple):
    """`tensor` times `expert` may exceed `ranks`: expert ranks are taken from data and tensor ranks alike."""

    ranks: int
    tensor: int
    expert: int
    variant: str = "plain"


# Four heads, so that four tensor ranks have one each. A slice of four ranks has 6 positions and the convolution reaches
# back 9: over two ranks. The last sequence of a batch has 8 documents, which slices and halos cut.
HEADS = "model.attention.num_heads=4"
VARIANTS = {
    "plain": (HEADS,),
    "compressed queries": (HEADS, "model.attention.query_lora_rank=8"),
    "one stream of text": (HEADS, "data.separate_documents=false", "engram.cut_at_documents=false"),
    "one branch": (HEADS, "engram.multi_branch=false"),
    "YaRN": (HEADS, "model.attention.rope=yarn", "model.attention.yarn_original_length=8"),
}
LAYOUTS = [
    *(Layout(2, 2, 1, variant) for variant in VARIANTS),
    Layout(2, 2, 2),
    Layout(4, 2, 1),
    Layout(4, 2, 2),
    Layout(4, 2, 4),
    Layout(4, 4, 1),
    Layout(4, 4, 2, "one branch"),
]


def _config(variant: str, *overrides: str) -> Any:
    return small_run_config("float64", [*VARIANTS[variant], *overrides])


def _layouts(rank: int, world_size: int) -> dict[Layout, dict[str, Any]]:
    return {
        layout: train(
            rank,
            world_size,
            _config(layout.variant, f"parallel.tensor={layout.tensor}", f"parallel.expert={layout.expert}"),
            STEPS,
        )
        for layout in [*LAYOUTS, Layout(1, 1, 1), Layout(1, 1, 1, "one stream of text")]
        if layout.ranks == world_size
    }


def _references(rank: int, world_size: int) -> dict[tuple[str, int], Any]:
    return {
        (variant, steps): dense_run(rank, world_size, _config(variant), steps)
        for variant in VARIANTS
        for steps in (1, STEPS)
    }


@cache
def _run_all(world_size: int) -> list[dict[Layout, dict[str, Any]]]:
    return run_ranks(_layouts, world_size, timeout_s=300.0)


def _run(layout: Layout) -> list[dict[str, Any]]:
    """What each rank saw."""
    return [of_rank[layout] for of_rank in _run_all(layout.ranks)]


@cache
def _dense() -> dict[tuple[str, int], dict[str, Any]]:
    return run_ranks(_references, 1)[0]


@pytest.mark.parametrize("layout", slow_above_two(LAYOUTS), ids=str)
def test_initial_weights_are_those_of_one_rank(layout: Layout) -> None:
    initial = whole_tensors([rank["initial"] for rank in _run(layout)])
    expected = _dense()[layout.variant, 1]["initial"]
    assert set(initial) == set(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(initial[name], value, err_msg=name)


@pytest.mark.parametrize("layout", slow_above_two(LAYOUTS), ids=str)
def test_loss_norm_and_every_gradient_equal_those_of_one_rank(layout: Layout) -> None:
    check_steps(_run(layout), _dense()[layout.variant, STEPS])


@pytest.mark.parametrize("steps", [1, STEPS])
@pytest.mark.parametrize("layout", slow_above_two(LAYOUTS), ids=str)
def test_optimizer_steps_lead_where_those_of_one_rank_lead(layout: Layout, steps: int) -> None:
    ranks, expected = _run(layout), _dense()[layout.variant, steps]
    parameters = whole_tensors([rank["steps"][steps - 1]["parameters"] for rank in ranks])
    assert largest_difference(live(parameters), live(expected["parameters"])) < FLOAT64
    if steps == STEPS:
        table = whole_table([rank["table"] for rank in ranks], expected["table"], np.nan)
        assert relative_difference(table, expected["table"]) < FLOAT64
        for rank in ranks:
            assert largest_difference(rank["expert_bias"], expected["expert_bias"]) == 0.0


@pytest.mark.parametrize("variant", ["plain", "one stream of text"])
def test_two_tensor_ranks_ask_for_the_rows_of_one(variant: str) -> None:
    """Position by position, in every step: nothing twice, nothing left out."""
    one, two = _run(Layout(1, 1, 1, variant))[0]["steps"], [r["steps"] for r in _run(Layout(2, 2, 1, variant))]
    for step in range(STEPS):
        at_once, parts = one[step], [steps[step] for steps in two]
        ids_NLBTH = np.concatenate([part["ids"] for part in parts], axis=3)
        np.testing.assert_array_equal(ids_NLBTH, at_once["ids"])
        assert at_once["ids"].shape[3] == LENGTH
        asked = [part["result"].gather for part in parts]
        assert sum(gather.lookups for gather in asked) == at_once["result"].gather.lookups == at_once["ids"].size
        # A row that both halves of the sequences use is asked for by both, any other by one of them.
        distinct = [set(part["ids"].ravel().tolist()) for part in parts]
        assert [gather.unique_rows for gather in asked] == [len(rows) for rows in distinct]
        in_both = len(distinct[0] & distinct[1])
        assert sum(gather.unique_rows for gather in asked) == at_once["result"].gather.unique_rows + in_both
        # The gradients come back on the same way: as many bytes as rows that crossed the wire.
        assert sum(g.gradient_bytes_sent for g in asked) == sum(g.row_bytes_received for g in asked)


def test_cases_that_the_comparison_promises_do_occur() -> None:
    steps = _dense()["plain", STEPS]["steps"]
    clip = small_run_config().optimizer.clip_grad_norm
    assert all(step["norm"] > clip for step in steps), "gradients are clipped"
    dims = {name: shard.dim for name, shard in _run(Layout(4, 4, 1))[0]["initial"].items()}
    assert {0, 1, None} == set(dims.values())
    assert dims["decoder.layers.0.self_attention.linear_proj.weight"] == 1
    assert all(dim is None for name, dim in dims.items() if "local_experts" in name)
    documents = global_batch(0).document_ids
    for border in (LENGTH // 4, LENGTH // 2):
        inside = (documents[:, border - 9 if border > 9 else 0] != documents[:, border]).any()
        across = (documents[:, border - 1] == documents[:, border]).any()
        assert inside, "a halo that a document start cuts"
        assert across, "a document that goes on over the border"
