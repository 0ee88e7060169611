"""Bytes that ranks send in a training step, counted at the communicator, against what the plan says.

What depends on the text is taken out: experts are chosen in turn, so that routing is even, and rows of the tables are
compared with the gather's own count, since how many repeat is up to the batch.
"""

from __future__ import annotations

from collections import Counter
from functools import cache
from typing import Any, NamedTuple

import pytest
from ranks import run_ranks
from small_run import build_small_run, global_batch, microbatches, small_run_config

from engram_megatron.config import RunConfig
from engram_megatron.model.traffic import rank_lookups, rank_traffic
from engram_megatron.model.transfers import ID_BYTES
from engram_megatron.training.plan_layout import takes_muon

TOLERANCE = 0.02
# Kinds that the plan does not claim to know so well
LOOSE = {
    ("control", ""): 0.25,  # a few hundred bytes: one more number that all ranks sum is not worth an error
    # between replicas and the owners of tensors: as if owners were drawn by lot, and few large tensors are not
    ("data", "all-to-all"): 0.3,
    ("expert data", "all-to-all"): 0.3,
}


class Layout(NamedTuple):
    ranks: int
    overrides: tuple[str, ...]

    def __str__(self) -> str:
        return " ".join(override.split(".")[-1] for override in self.overrides) or f"data={self.ranks}"


LAYOUTS = [
    Layout(2, ()),
    Layout(2, ("parallel.expert=2",)),
    Layout(2, ("parallel.tensor=2",)),
    Layout(4, ("parallel.tensor=2", "parallel.expert=2", "model.attention.query_lora_rank=8")),
    Layout(2, ("parallel.pipeline=2",)),
    Layout(4, ("parallel.pipeline=2", "parallel.tensor=2", "training.dtype=float32")),
    Layout(2, ("parallel.pipeline=2", "parallel.virtual_pipeline=2", "model.num_layers=4")),
    Layout(2, ("parallel.pipeline=2", "model.mtp.num_layers=1", "training.recompute=full")),
    Layout(4, ("parallel.pipeline=2", "parallel.tensor=2", "model.mtp.num_layers=1")),
    Layout(2, ("parallel.tensor=2", "training.recompute=full")),
    Layout(2, ("parallel.expert=2", "training.recompute=selective", "training.recompute_modules=feed_forward,mhc")),
    Layout(2, ("parallel.distributed_optimizer=true",)),
    Layout(4, ("parallel.tensor=2", "parallel.expert=2", "parallel.distributed_optimizer=true")),
    Layout(2, ("parallel.context=2",)),
    Layout(4, ("parallel.context=2", "parallel.tensor=2", "parallel.expert=2")),
]


def _config(layout: Layout) -> RunConfig:
    # Every rank a node of its own: what ranks of a node read from each other crosses no wire.
    return small_run_config("float64", [*layout.overrides, "tables.ranks_per_node=1"])


def _route_in_turn() -> None:
    """Copy number i of a rank goes to expert i modulo their number, whatever the scores say."""
    import torch

    from engram_megatron.model.router import SigmoidRouter

    def in_turn(router: Any, biased_NE: Any) -> Any:
        num_tokens, num_experts = biased_NE.shape
        return (torch.arange(num_tokens * router.topk) % num_experts).view(num_tokens, router.topk)

    SigmoidRouter.choose = in_turn  # type: ignore[method-assign]


def _group_names(run: Any) -> dict[str, str]:
    """The plan's words for torch's process groups; those that carry a few bytes only are left out."""
    from megatron.core import parallel_state as state

    groups = {
        "tensor x context": state.get_tensor_and_context_parallel_group(),
        "tensor": state.get_tensor_model_parallel_group(),
        "context": state.get_context_parallel_group(),
        "expert": state.get_expert_model_parallel_group(),
        "expert data": state.get_expert_data_parallel_group(),
        "data": state.get_data_parallel_group(with_context_parallel=True),
        "embedding": state.get_embedding_group(),
        "tables": run.memory.lookup.groups.rail.inner.group,
    }
    names = {group.group_name: name for name, group in groups.items()}
    if run.config.parallel.context == 1:  # the same ranks, by another communicator
        names[groups["tensor x context"].group_name] = "tensor"
    return names


def _measure(rank: int, world_size: int, layouts: list[Layout]) -> list[dict[str, Any]]:
    from engram_megatron.training.collective_bytes import count_collective_bytes

    _route_in_turn()
    results = []
    for layout in layouts:
        run = build_small_run(_config(layout), rank, world_size)
        names = _group_names(run)
        mine = microbatches(global_batch(0), run.ranks.data_rank, run.ranks.data_ranks)
        with count_collective_bytes() as sent:
            result = run.trainer.train_step(0, mine, stop_requested=False)
        measured: Counter[tuple[str, str]] = Counter()
        for (group, collective), count in sent.items():
            # Among two pipeline ranks megatron-core sends one way over the group of all ranks.
            name = "pipeline" if collective == "send" else names.get(group, "control")
            measured[name, "" if name == "control" else collective] += count
        place = {"config": run.config, "pipeline_rank": run.ranks.pipeline_rank}
        results.append({"measured": measured, "gather": result.gather, **place})
    return results


@cache
def _all_measured(ranks: int) -> dict[Layout, list[dict[str, Any]]]:
    layouts = [layout for layout in LAYOUTS if layout.ranks == ranks]
    of_ranks = run_ranks(_measure, ranks, layouts, timeout_s=200.0)
    return {layout: [results[i] for results in of_ranks] for i, layout in enumerate(layouts)}


def _predicted(config: RunConfig, ranks: int, pipeline_rank: int) -> Counter[tuple[str, str]]:
    predicted: Counter[tuple[str, str]] = Counter()
    for transfer in rank_traffic(config, ranks, pipeline_rank, takes_muon(config)):
        predicted[transfer.group, "" if transfer.group == "control" else transfer.collective] += transfer.bytes
    return predicted


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_kind_of_collective_sends_what_the_plan_says(layout: Layout) -> None:
    for rank, of_rank in enumerate(_all_measured(layout.ranks)[layout]):
        measured, predicted = of_rank["measured"], _predicted(of_rank["config"], layout.ranks, of_rank["pipeline_rank"])
        kinds = {kind for kind in measured | predicted if kind[0] != "tables"}
        for kind in kinds:
            tolerance = LOOSE.get(kind, TOLERANCE)
            assert predicted[kind] == pytest.approx(measured[kind], rel=tolerance), (rank, kind)
        assert measured["control", ""] < 0.01 * sum(measured.values())


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_tables_send_what_the_gather_counts_and_no_more_than_the_plan_says(layout: Layout) -> None:
    of_ranks = _all_measured(layout.ranks)[layout]
    key = ("tables", "all-to-all")
    for of_rank in of_ranks:
        gather = of_rank["gather"]
        assert gather.lookups == rank_lookups(of_rank["config"], layout.ranks, of_rank["pipeline_rank"])
        counts = (layout.ranks - 1) * of_rank["config"].tables.waves * ID_BYTES
        sent = gather.id_bytes_sent + gather.row_bytes_sent + gather.gradient_bytes_sent
        assert of_rank["measured"][key] == sent + counts
    bound = sum(_predicted(r["config"], layout.ranks, r["pipeline_rank"])[key] for r in of_ranks)
    assert 0 < sum(r["measured"][key] for r in of_ranks) < bound


def test_layouts_send_by_every_kind_of_collective() -> None:
    """A kind that no layout has would be compared as nothing with nothing."""
    results = [result for ranks in (2, 4) for of_ranks in _all_measured(ranks).values() for result in of_ranks]
    sent = {kind for result in results for kind in +result["measured"]}
    assert {("data", "all-reduce"), ("expert data", "all-reduce"), ("expert", "all-to-all")} <= sent
    assert {("tensor", kind) for kind in ("all-gather", "reduce-scatter", "all-reduce")} <= sent
    assert {
        ("pipeline", "send"),
        ("embedding", "all-reduce"),
        ("context", "all-gather"),
        ("tensor x context", "reduce-scatter"),
    } <= sent
