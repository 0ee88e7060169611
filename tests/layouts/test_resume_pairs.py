"""Saved in one layout, resumed in another, and back: nothing is lost, and nobody notices. All pairs: `make layouts`."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from engram_megatron.layouts import resume_table
from engram_megatron.layouts.checkpoint_contents import first_difference
from engram_megatron.layouts.matrix import Layout
from engram_megatron.layouts.resume_judge import OneRank, PairRun, distance, judge_pair
from engram_megatron.layouts.resume_pairs import PAIRS, Pair
from engram_megatron.layouts.resume_table import run_pair
from engram_megatron.model.layout_rules import check_layout

# The embedding stands on two stages, and blocks of rows are cut at other places.
STAGES = Pair(
    before=Layout(2, pipeline=2, virtual_pipeline=2),
    after=Layout(2, tensor=2),
    mtp=True,
    after_too=("tables.block_rows=20", "training.micro_batch_size=2"),
)
# Matrices have one owner each, those of experts among the replicas of their experts; bfloat16 weights have masters.
OWNERS = Pair(before=Layout(4, expert=2, distributed_optimizer=True), after=Layout(1), dtype="bfloat16")
THREE = Pair(before=Layout(4, context=2, expert=2), after=Layout(3), run=("training.global_batch_size=12",))


@pytest.mark.slow
@pytest.mark.parametrize("pair", [STAGES, THREE], ids=lambda pair: pair.name)
def test_resumed_in_another_layout_and_back(pair: Pair) -> None:
    """In float64, each with the experts that it chooses; see `engram_megatron.layouts.judge` for the bound."""
    run = run_pair(pair, "float64", choices=None)
    assert (run.changed_by_after, run.changed_by_before) == (None, None)
    assert run.num_tensors > 250
    assert run.goes_on
    loss, drift = distance(run.resumed, run.unbroken)
    assert loss < 1e-9
    assert drift < 1e-9


@pytest.fixture(scope="module")
def owners() -> PairRun:
    return run_pair(OWNERS, "bfloat16", choices=None)


def exact(run: PairRun) -> OneRank:
    """Bounds of zero."""
    return OneRank(float64=run.resumed[0], float32=[run.resumed[0]])


def test_bfloat16_is_the_same_in_both_checkpoints_and_goes_on(owners: PairRun) -> None:
    assert owners.same
    assert judge_pair(OWNERS, owners, exact(owners)).passes


def test_run_that_goes_on_otherwise_fails(owners: PairRun) -> None:
    *steps, last = owners.back[1].steps
    by_one_bit = replace(last, gradient_norm=last.gradient_norm * (1 + 2**-50))
    back = [*owners.back]
    back[1] = replace(back[1], steps=[*steps, by_one_bit])
    assert not judge_pair(OWNERS, replace(owners, back=back), exact(owners)).passes


def test_run_that_is_farther_than_its_bound_fails(owners: PairRun) -> None:
    outcome = judge_pair(replace(OWNERS, dtype="float32"), owners, exact(owners))
    assert outcome.run.same
    assert outcome.drift > outcome.drift_bound == 0
    assert not outcome.passes


def test_tensor_that_is_lost_or_changed_is_named() -> None:
    saved = {"a": torch.tensor([0.0, 1.0]), "b": torch.tensor(3)}
    assert first_difference(saved, dict(saved)) is None
    assert first_difference({"a": saved["a"]}, saved) == "b"
    assert first_difference(saved | {"a": torch.tensor([-0.0, 1.0])}, saved) == "a"
    assert first_difference(saved | {"a": saved["a"].double()}, saved) == "a"


def test_resume_that_cannot_be_is_a_line_with_its_rule(owners: PairRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume_table, "run_one_rank", lambda _pair: exact(owners))
    (line,) = resume_table.lines([Pair(before=Layout(2, tensor=2, expert=3), after=Layout(2))])
    assert not line.passes
    assert "is not divisible by expert = 3" in line.text


def test_pairs_are_layouts_that_train_and_all_axes_come_and_go() -> None:
    for pair in PAIRS:
        for config, ranks in (
            (pair.config_before(pair.dtype), pair.before),
            (pair.config_after(pair.dtype), pair.after),
        ):
            config.validate()
            check_layout(config, ranks.ranks)
    assert len({(pair.name, pair.variation) for pair in PAIRS}) == len(PAIRS) >= 16
    for axis in ("ranks", "tensor", "pipeline", "virtual_pipeline", "expert", "context", "distributed_optimizer"):
        assert any(getattr(pair.before, axis) != getattr(pair.after, axis) for pair in PAIRS), axis
