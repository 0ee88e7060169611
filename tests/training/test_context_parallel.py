"""Whole runs with sequences divided over 2 and 4 context ranks, alone and with tensor, expert, data and pipeline
parallelism, against one process that holds everything: loss, clip norm, every gradient, five optimizer steps, and the
rows asked for.
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
from engram_megatron.model.sequence_partition import SequencePartition

STEPS = 5


class Layout(NamedTuple):
    """Ranks that `context`, `tensor` and `pipeline` leave over are data-parallel; expert ranks are taken from all but
    the pipeline."""

    ranks: int
    context: int
    tensor: int = 1
    expert: int = 1
    variant: str = "packed"
    pipeline: int = 1


# Pieces have 6 positions (two context ranks) or 3 (four, or two with two tensor ranks); the convolution reaches back 9.
VARIANTS = {
    "packed": (),
    "one document": ("data.separate_documents=false", "engram.cut_at_documents=false"),
    "compressed queries": ("model.attention.query_lora_rank=8",),
    "one branch": ("engram.multi_branch=false",),
    "YaRN": ("model.attention.rope=yarn", "model.attention.yarn_original_length=8"),
}
LAYOUTS = [
    *(Layout(2, 2, variant=variant) for variant in VARIANTS),
    Layout(2, 2, expert=2),
    Layout(2, 2, expert=2, variant="one document"),
    *(
        Layout(4, context, tensor, expert, variant)
        for context, tensor, expert in [(4, 1, 1), (2, 2, 1), (2, 1, 1)]
        for variant in ("packed", "one document")
    ),
    Layout(4, 2, 2, 4),
    Layout(4, 4, 1, 2),
    Layout(4, 2, 1, 2, "one branch"),
    Layout(4, 2, expert=2, pipeline=2),
]


def _layouts(rank: int, world_size: int, layouts: list[Layout]) -> dict[Layout, dict[str, Any]]:
    return {
        layout: train(
            rank,
            world_size,
            small_run_config(
                "float64",
                [
                    *VARIANTS[layout.variant],
                    f"parallel.context={layout.context}",
                    f"parallel.tensor={layout.tensor}",
                    f"parallel.expert={layout.expert}",
                    f"parallel.pipeline={layout.pipeline}",
                ],
            ),
            STEPS,
        )
        for layout in layouts
    }


def _references(rank: int, world_size: int) -> dict[str, Any]:
    return {
        variant: dense_run(rank, world_size, small_run_config("float64", overrides), STEPS)
        for variant, overrides in VARIANTS.items()
    }


@cache
def _run_all(world_size: int) -> list[dict[Layout, dict[str, Any]]]:
    layouts = [layout for layout in [*LAYOUTS, Layout(1, 1)] if layout.ranks == world_size]
    return run_ranks(_layouts, world_size, layouts, timeout_s=400.0)


def _run(layout: Layout) -> list[dict[str, Any]]:
    """What each rank saw."""
    return [of_rank[layout] for of_rank in _run_all(layout.ranks)]


@cache
def _dense() -> dict[str, dict[str, Any]]:
    return run_ranks(_references, 1, timeout_s=400.0)[0]


@pytest.mark.parametrize("layout", slow_above_two(LAYOUTS), ids=str)
def test_loss_norm_and_every_gradient_equal_those_of_one_rank(layout: Layout) -> None:
    check_steps(_run(layout), _dense()[layout.variant])


@pytest.mark.parametrize("layout", slow_above_two(LAYOUTS), ids=str)
def test_optimizer_steps_lead_where_those_of_one_rank_lead(layout: Layout) -> None:
    ranks, expected = _run(layout), _dense()[layout.variant]
    parameters = whole_tensors([rank["steps"][-1]["parameters"] for rank in ranks])
    assert largest_difference(live(parameters), live(expected["parameters"])) < FLOAT64
    table = whole_table([rank["table"] for rank in ranks], expected["table"], np.nan)
    assert relative_difference(table, expected["table"]) < FLOAT64
    biases = [(name, bias) for rank in ranks for name, bias in rank["expert_bias"].items()]
    assert {name for name, _ in biases} == set(expected["expert_bias"])
    for name, bias in biases:
        np.testing.assert_array_equal(bias, expected["expert_bias"][name], err_msg=name)


@pytest.mark.parametrize(("context", "tensor"), [(2, 1), (4, 1), (2, 2)])
def test_context_ranks_share_the_lookups_of_one_rank(context: int, tensor: int) -> None:
    """Position by position: nothing twice, nothing left out."""
    partition = SequencePartition(context=context, tensor=tensor)
    ranks = _run(Layout(partition.num_ranks, context, tensor))
    positions = np.concatenate([partition.positions(LENGTH, rank) for rank in range(partition.num_ranks)])
    for step, at_once in enumerate(_run(Layout(1, 1))[0]["steps"]):
        parts = [rank["steps"][step] for rank in ranks]
        ids_NLBTH = np.concatenate([part["ids"] for part in parts], axis=3)
        np.testing.assert_array_equal(ids_NLBTH, at_once["ids"][:, :, :, positions])
        lookups = sum(part["result"].gather.lookups for part in parts)
        assert lookups == at_once["result"].gather.lookups == ids_NLBTH.size


def test_cases_that_the_comparison_promises_do_occur() -> None:
    clip = small_run_config().optimizer.clip_grad_norm
    assert all(step["norm"] > clip for step in _dense()["packed"]["steps"]), "gradients are clipped"
    documents = global_batch(0).document_ids
    for border in (LENGTH // 4, LENGTH // 2, 3 * LENGTH // 4):
        assert (documents[:, max(border - 9, 0)] != documents[:, border]).any(), "a halo that a document start cuts"
        assert (documents[:, border - 1] == documents[:, border]).any(), "a document that goes on over the border"
    assert global_batch(0).loss_mask[:, : LENGTH // 2].sum() != global_batch(0).loss_mask[:, LENGTH // 2 :].sum()
