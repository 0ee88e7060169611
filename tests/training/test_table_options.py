"""What `tables.*` may change: memory and time, or what a row does between gradients; never more than it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ranks import run_ranks
from small_run import build_small_run, finished_table, global_batch, microbatches, small_run_config

from engram_megatron.tables.row_layout import RowLayout

STEPS = 4
OPTIONS = {
    "eager": (),
    "lazy": ("tables.commit=lazy",),
    "apart": ("tables.ranks_per_node=1",),
    "lazy apart": ("tables.commit=lazy", "tables.ranks_per_node=1"),
    "touched": ("tables.update=touched",),
    "bfloat16": ("tables.dtype=bfloat16",),
    "sinkhorn": ("tables.update=sinkhorn",),
    "sinkhorn apart": ("tables.update=sinkhorn", "tables.ranks_per_node=1", "tables.overlap=false"),
}
NVME = ("tables.placement=nvme", "tables.hot_fraction=0.05")
NVME_OPTIONS = {  # each as the option without "nvme"
    "nvme eager": NVME,
    "nvme apart": (*NVME, "tables.ranks_per_node=1", "tables.commit=lazy"),
    "nvme touched": (*NVME, *OPTIONS["touched"]),
    "nvme bfloat16": (*NVME, *OPTIONS["bfloat16"]),
}


def _train(rank: int, world_size: int, nvme_dir: Path) -> dict[str, dict[str, Any]]:
    found = {}
    in_files = {name: (*overrides, f"tables.nvme_dir={nvme_dir}") for name, overrides in NVME_OPTIONS.items()}
    for name, overrides in (OPTIONS | in_files).items():
        run = build_small_run(small_run_config("float32", overrides), rank, world_size)
        before, losses = finished_table(run.memory), []
        for step in range(STEPS):
            mine = microbatches(global_batch(step), run.ranks.data_rank, run.ranks.data_ranks)
            losses.append(run.trainer.train_step(step, mine, stop_requested=False).loss)
        layout: RowLayout = run.memory.lookup.layout
        found[name] = {
            "losses": losses,
            "rows": layout.global_row(rank, np.arange(run.memory.shard.num_rows)),
            "before": before,
            "after": finished_table(run.memory),
            "last_step": run.memory.shard.last_step.copy(),
            "resident": run.memory.shard.memory.resident_bytes(),
            "metrics": run.trainer.metrics(
                run.trainer.train_step(
                    STEPS,
                    microbatches(global_batch(STEPS), run.ranks.data_rank, run.ranks.data_ranks),
                    stop_requested=False,
                )
            ),
        }
    return found


@pytest.fixture(scope="module")
def found(disk_folders: pytest.TempPathFactory) -> list[dict[str, dict[str, Any]]]:
    return run_ranks(_train, 2, disk_folders.mktemp("nvme"))


def _table(found: list[dict[str, dict[str, Any]]], name: str, which: str = "after") -> np.ndarray[Any, Any]:
    rows = np.concatenate([of_rank[name]["rows"] for of_rank in found])
    return np.concatenate([of_rank[name][which] for of_rank in found])[np.argsort(rows)]


def test_lazy_tables_are_eager_ones_to_the_bit_and_take_what_was_touched(
    found: list[dict[str, dict[str, Any]]],
) -> None:
    for lazy, eager in (("lazy", "eager"), ("lazy apart", "apart")):
        assert found[0][lazy]["losses"] == found[0][eager]["losses"]
        np.testing.assert_array_equal(_table(found, lazy), _table(found, eager))
    assert found[0]["lazy"]["resident"] < found[0]["eager"]["resident"]


@pytest.mark.parametrize("name", NVME_OPTIONS)
def test_tables_on_nvme_are_those_in_memory_to_the_bit(found: list[dict[str, dict[str, Any]]], name: str) -> None:
    in_memory = name.removeprefix("nvme ")
    assert found[0][name]["losses"] == found[0][in_memory]["losses"]
    for which in ("before", "after", "last_step"):
        np.testing.assert_array_equal(_table(found, name, which), _table(found, in_memory, which))


def test_nodes_change_rounding_only(found: list[dict[str, dict[str, Any]]]) -> None:
    np.testing.assert_allclose(found[0]["apart"]["losses"], found[0]["eager"]["losses"], rtol=1e-5)


def test_touched_rows_only_leaves_others_where_their_last_gradient_left_them(
    found: list[dict[str, dict[str, Any]]],
) -> None:
    last_step = _table(found, "touched", "last_step")
    never = last_step == 0
    assert never.any()
    np.testing.assert_array_equal(_table(found, "touched")[never], _table(found, "touched", "before")[never])
    missed = (last_step > 0) & (last_step < STEPS)
    assert missed.any()
    assert (_table(found, "touched")[missed] != _table(found, "eager")[missed]).any()
    assert found[0]["touched"]["losses"][:2] == found[0]["eager"]["losses"][:2], "in step 2 no row has missed a step"


def test_bfloat16_rows_train_as_float32_ones_but_for_their_rounding(found: list[dict[str, dict[str, Any]]]) -> None:
    np.testing.assert_allclose(found[0]["bfloat16"]["losses"], found[0]["eager"]["losses"], rtol=5e-3)


def test_balanced_momentum_trains_on_one_node_as_on_two(found: list[dict[str, dict[str, Any]]]) -> None:
    losses = found[0]["sinkhorn"]["losses"]
    np.testing.assert_allclose(found[0]["sinkhorn apart"]["losses"], losses, rtol=1e-5)
    assert losses[0] == found[0]["eager"]["losses"][0]
    assert losses[1:] != found[0]["eager"]["losses"][1:]
    moved = _table(found, "sinkhorn") != _table(found, "sinkhorn", "before")
    assert moved[_table(found, "sinkhorn", "last_step") > 0].any()
    assert not moved[_table(found, "sinkhorn", "last_step") == 0].any()


def test_tables_tell_how_they_are(found: list[dict[str, dict[str, Any]]]) -> None:
    values = found[0]["eager"]["metrics"]
    others = found[1]["eager"]["metrics"]
    assert {name: values[name] for name in values if not name.startswith("perf/")} == {
        name: others[name] for name in others if not name.startswith("perf/")
    }
    touched = np.mean(_table(found, "eager", "last_step") > 0)
    assert values["tables/never_touched"] == pytest.approx(1 - touched, abs=0.05)  # one step later
    assert values["tables/owner_imbalance"] >= 1
    assert 0 < values["tables/update_to_weight"] < 1
    assert 0 < values["gather/hottest_share"] <= 1
    for task in ("plan", "fetch", "return", "update"):
        assert values[f"tables/{task}_ms"] > 0
