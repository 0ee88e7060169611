"""Which data replica owns the optimizer's state of which tensor (ZeRO-1, arXiv 1910.02054): arithmetic, no torch.

    Muon's matrices             whole, because Newton-Schulz needs a whole matrix; dealt by their cost, largest first
    the vocabulary's matrices   by rows, as many to every replica: each is larger than a replica's share of the model
    vectors                     whole, to the replica that keeps the least state so far

Costs are those of whole tensors, so all ranks of a tensor-parallel group find the same owner for their parts of a
matrix, and its rows of the vocabulary are the same share of each rank's rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from engram_megatron.optimizer.parameter_groups import MatrixSplit, TensorRule

STATE_VALUES = {"muon": 1, "adam": 2}  # values that the optimizer keeps per element, a bfloat16 run's master aside


@dataclass(frozen=True, kw_only=True)
class Dealt:
    """A tensor to deal: its rule, its whole shape, and the number of rows (first dimension) that a rank holds."""

    rule: TensorRule
    whole_shape: tuple[int, ...]
    local_rows: int

    @property
    def state_values(self) -> int:
        """State of the whole tensor."""
        return STATE_VALUES[self.rule.optimizer] * prod(self.whole_shape)


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Rows `first_row` .. `end_row` - 1 of a rank's part of tensor number `tensor`, owned by replica `owner`."""

    tensor: int
    first_row: int
    end_row: int
    owner: int


def deal(tensors: Sequence[Dealt], replicas: int) -> list[Piece]:
    """Pieces that cover every row of every tensor once, in the order of the tensors and their rows.

    The cost of the costliest replica is at most the mean cost plus that of one matrix.
    """
    cost, values = [0] * replicas, [0] * replicas
    pieces = []
    matrices = [i for i, tensor in enumerate(tensors) if tensor.rule.optimizer == "muon"]
    for i in sorted(matrices, key=lambda i: -newton_schulz_cost(tensors[i].whole_shape, tensors[i].rule.split)):
        owner = min(range(replicas), key=lambda replica: (cost[replica], values[replica], replica))
        cost[owner] += newton_schulz_cost(tensors[i].whole_shape, tensors[i].rule.split)
        values[owner] += tensors[i].state_values
        pieces.append(Piece(tensor=i, first_row=0, end_row=tensors[i].local_rows, owner=owner))
    by_rows = [i for i, tensor in enumerate(tensors) if tensor.rule.by_rows]
    for i in by_rows:  # the same state for all: `values` need not know
        pieces += _by_rows(i, tensors[i].local_rows, replicas)
    vectors = [i for i in range(len(tensors)) if i not in {*matrices, *by_rows}]
    for i in sorted(vectors, key=lambda i: -tensors[i].state_values):
        owner = min(range(replicas), key=lambda replica: (values[replica], replica))
        values[owner] += tensors[i].state_values
        pieces.append(Piece(tensor=i, first_row=0, end_row=tensors[i].local_rows, owner=owner))
    return sorted(pieces, key=lambda piece: (piece.tensor, piece.first_row))


def _by_rows(tensor: int, rows: int, replicas: int) -> list[Piece]:
    """Shares that differ by one row at most."""
    bounds = [rows * replica // replicas for replica in range(replicas + 1)]
    return [
        Piece(tensor=tensor, first_row=bounds[replica], end_row=bounds[replica + 1], owner=replica)
        for replica in range(replicas)
        if bounds[replica] < bounds[replica + 1]
    ]


def newton_schulz_cost(shape: Sequence[int], split: MatrixSplit | None) -> int:
    """Multiply-adds of one Newton-Schulz step on a matrix [rows, columns] or a stack [..., rows, columns] of them,
    each part of a fused matrix on its own: with m <= n its sides, X X^T and (bA + cA^2) X take m*m*n each, A^2 m^3."""
    *stack, rows, columns = shape
    parts = [rows] if split is None else [size * split.repeats for size in split.sizes]
    sides = [sorted((part, columns)) for part in parts]
    return prod(stack) * sum(small * small * (2 * large + small) for small, large in sides)
