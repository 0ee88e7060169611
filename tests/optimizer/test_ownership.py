"""Who owns what: everything once, evenly, and the same on all ranks of a tensor group."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from engram_megatron.model.counts import parameter_specs
from engram_megatron.optimizer.ownership import Dealt, Piece, deal, newton_schulz_cost
from engram_megatron.optimizer.parameter_groups import MatrixSplit, parameter_rules
from engram_megatron.presets import engram_27b


def _layers(first: int, last: int, *, tensor: int = 1) -> list[Dealt]:
    """The dense tensors of some layers of engram_27b with both vocabulary matrices; matrices divided by rows."""
    config = engram_27b()
    rules = parameter_rules(config.model, config.engram)
    specs = [s for s in parameter_specs(config) if s.layer is None or first <= s.layer < last]
    specs = [s for s in specs if s.part != "routed experts"]
    return [
        Dealt(rule=rules.rule(s.name, s.shape), whole_shape=tuple(s.shape), local_rows=s.shape[0] // tensor)
        for s in specs
    ]


def _owners(pieces: list[Piece]) -> list[tuple[int, int]]:
    return [(piece.tensor, piece.owner) for piece in pieces]


@pytest.mark.parametrize("replicas", [1, 2, 3, 8, 64, 300])
def test_every_row_of_every_tensor_has_one_owner(replicas: int) -> None:
    tensors = _layers(0, 8)
    pieces = deal(tensors, replicas)
    assert {piece.owner for piece in pieces} <= set(range(replicas))
    for number, tensor in enumerate(tensors):
        mine = [piece for piece in pieces if piece.tensor == number]
        ends = [0, *(piece.end_row for piece in mine)]
        assert ends[-1] == tensor.local_rows
        assert [piece.first_row for piece in mine] == ends[:-1]
        assert all(piece.first_row < piece.end_row for piece in mine)
        if tensor.rule.optimizer == "muon":
            assert len(mine) == 1, "Newton-Schulz needs the whole matrix"


def _loads(tensors: list[Dealt], replicas: int) -> tuple[list[int], list[float]]:
    """(Newton-Schulz cost, state values) of each replica."""
    cost, values = [0] * replicas, [0.0] * replicas
    for piece in deal(tensors, replicas):
        tensor = tensors[piece.tensor]
        share = (piece.end_row - piece.first_row) / tensor.local_rows
        values[piece.owner] += tensor.state_values * share
        if tensor.rule.optimizer == "muon":
            cost[piece.owner] += newton_schulz_cost(tensor.whole_shape, tensor.rule.split)
    return cost, values


@pytest.mark.parametrize("replicas", [2, 4, 8, 16])
def test_costs_and_state_of_the_27b_model_are_even(replicas: int) -> None:
    """All 30 layers: enough matrices for 16 replicas. The first is what greedy dealing promises; 5 and 20 % are above
    what it gives here."""
    tensors = _layers(0, 30)
    cost, values = _loads(tensors, replicas)
    largest = max(newton_schulz_cost(t.whole_shape, t.rule.split) for t in tensors if t.rule.optimizer == "muon")
    assert max(cost) <= sum(cost) / replicas + largest
    assert max(cost) < 1.05 * sum(cost) / replicas
    assert max(values) < 1.2 * sum(values) / replicas


def test_vocabulary_is_divided_to_the_row() -> None:
    tensors = _layers(0, 1)
    rows: dict[tuple[int, int], int] = {}
    for piece in deal(tensors, 7):
        if tensors[piece.tensor].rule.by_rows:
            rows[piece.tensor, piece.owner] = piece.end_row - piece.first_row
    assert len(rows) == 14
    assert set(rows.values()) == {129280 // 7, 129280 // 7 + 1}


@pytest.mark.parametrize("tensor", [2, 4])
def test_tensor_ranks_find_the_owners_of_undivided_tensors(tensor: int) -> None:
    """A rank that holds a fourth of each matrix must gather it from ranks that update it at the same time."""
    assert _owners(deal(_layers(0, 8, tensor=tensor), 8)) == _owners(deal(_layers(0, 8), 8))


@pytest.mark.parametrize(
    ("shape", "split"),
    [
        ((40, 64), None),
        ((64, 40), None),
        ((48, 48), None),
        ((60, 64), MatrixSplit(sizes=(30, 30), per_rank=True)),
        ((112, 24), MatrixSplit(sizes=(16, 12), repeats=4)),
        ((6, 60, 32), MatrixSplit(sizes=(30, 30), per_rank=True)),
    ],
    ids=str,
)
def test_cost_is_the_multiplications_that_muon_does(shape: tuple[int, ...], split: Any) -> None:
    """Counted by torch on the optimizer's own step."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from engram_megatron import platform

    platform.install()
    from engram_megatron.config_optimizer import OptimizerConfig
    from engram_megatron.optimizer.muon import Muon, muon_group

    weight = torch.randn(shape)
    weight.grad = torch.randn(shape)
    config = replace(OptimizerConfig(), muon_ns_steps=3)
    muon = Muon([muon_group([weight], weight_decay=0.0, split=split)], config)
    with FlopCounterMode(display=False) as counter:
        muon.step()
    assert counter.get_total_flops() == 2 * 3 * newton_schulz_cost(shape, split)
