"""From the parts that ranks hold to whole tensors, and how far they are from one rank's."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from math import inf, isqrt
from typing import NamedTuple

import numpy as np

from engram_megatron.layouts.records import Array, RankRecord, Rows, Shard, State

# The first sub-layer behind the expansion of streams sees equal streams: every doubly stochastic H_res leaves them as
# they are, and the norm behind H_pre takes its scale away. Both have gradients that are zero up to rounding, which Adam
# and Muon turn into steps without a direction. They change nothing that the model computes; only H_post does.
_EQUAL_STREAMS = re.compile(r"(decoder\.layers\.0\.|mtp\..*)mhc_attention\.(bias|mapping\.weight|alpha)$")


class DisagreementError(AssertionError):
    """Ranks that should hold the same tensor hold different ones."""


class Difference(NamedTuple):
    """The largest difference of a comparison, and the tensor that has it."""

    value: float
    where: str


def whole_tensors(parts: Iterable[Mapping[str, Shard]]) -> dict[str, Array]:
    """The global tensors from the shards of all ranks.

    Raises:
        DisagreementError: two ranks hold the same part of a tensor, but not bit for bit.
    """
    by_name: dict[str, dict[int, Shard]] = {}
    for part in parts:
        for name, shard in part.items():
            place = 0 if shard.dim is None else shard.part
            first = by_name.setdefault(name, {}).setdefault(place, shard)
            if not np.array_equal(first.values, shard.values):
                raise DisagreementError(f"{name} is not the same on all ranks that hold it")
    return {name: _joined(name, [places[place] for place in sorted(places)]) for name, places in by_name.items()}


def _joined(name: str, shards: Sequence[Shard]) -> Array:
    values, dim = [shard.values for shard in shards], shards[0].dim
    if dim is None:
        return values[0]
    if name.endswith("linear_fc1.weight"):  # each rank: its gate rows, then its up rows
        halves = [np.split(value, 2) for value in values]
        return np.concatenate([half[i] for i in (0, 1) for half in halves])
    return np.concatenate(values, axis=dim)


def live(tensors: Mapping[str, Array]) -> dict[str, Array]:
    """Parameters, or their gradients, without what rounding noise alone moves."""
    return {name: _h_post(name, tensor) if _EQUAL_STREAMS.search(name) else tensor for name, tensor in tensors.items()}


def _h_post(name: str, tensor: Array) -> Array:
    """The part of a hyper-connection's parameter that H_post is made of; the order is H_pre, H_post, H_res."""
    if name.endswith("alpha"):
        return tensor[1:2]
    streams = isqrt(len(tensor) + 1) - 1  # rows: M + M + M * M
    return tensor[streams : 2 * streams]


def whole_table(parts: Iterable[Rows], num_rows: int) -> Array:
    """[num_rows, D] from the rows of all ranks, zero where nobody has one; [0, 0] where there is no table."""
    kept = [part for part in parts if len(part.ids)]
    if not kept:
        return np.zeros((0, 0))
    table = np.zeros((num_rows, kept[0].values.shape[1]), kept[0].values.dtype)
    for part in kept:
        table[part.ids] = part.values
    return table


def moved_state(parts: Sequence[State]) -> dict[str, Array]:
    """Live parameters and the table: what the optimizers move."""
    num_rows = sum(len(part.table.ids) for part in parts)
    table = whole_table((part.table for part in parts), num_rows)
    return live(whole_tensors(part.parameters for part in parts)) | {"table": table}


def whole_state(parts: Sequence[State]) -> dict[str, Array]:
    """Live parameters, the table and the balancing biases."""
    biases = whole_tensors({name: Shard(b, None, 0) for name, b in part.expert_bias.items()} for part in parts)
    return moved_state(parts) | biases


def tokens_per_expert(records: Sequence[RankRecord], step: int) -> dict[int, Array]:
    """Tokens that each expert of each layer got from all ranks: equal where no router chose differently."""
    totals: dict[int, Array] = {}
    for record in records:
        for layer, counts in record.steps[step].tokens_per_expert.items():
            totals[layer] = totals.get(layer, 0) + counts
    return totals


def largest_difference(ours: Mapping[str, Array], theirs: Mapping[str, Array]) -> Difference:
    """Over all tensors, relative to the largest value of each tensor of `theirs`."""
    missing = set(ours) ^ set(theirs)
    if missing:
        raise DisagreementError(f"{sorted(missing)[0]} is on one side only")
    differences = (Difference(_relative(ours[name], theirs[name]), name) for name in theirs)
    return max(differences, key=lambda difference: difference.value)


def drift(ours: Mapping[str, Array], theirs: Mapping[str, Array], start: Mapping[str, Array]) -> float:
    """Frobenius norm of ours - theirs relative to how far `theirs` moved from `start`: over the backbone, and over the
    table, whichever is larger. Not by tensor: Adam makes full steps of the smallest gradients, so that a single small
    tensor shows the luck of a sign."""
    shares = [{name for name in theirs if (name == "table") == of_table} for of_table in (True, False)]

    def norm(a: Mapping[str, Array], b: Mapping[str, Array], names: set[str]) -> float:
        return float(np.sqrt(sum(np.square(a[name] - b[name], dtype=np.float64).sum() for name in names)))

    return max(norm(ours, theirs, names) / norm(theirs, start, names) for names in shares)


def _relative(ours: Array, theirs: Array) -> float:
    if ours.shape != theirs.shape:
        raise DisagreementError(f"shapes {ours.shape} and {theirs.shape}")
    difference, scale = np.abs(ours - theirs).max(initial=0.0), np.abs(theirs).max(initial=0.0)
    if not np.isfinite(difference):
        return inf  # what is not a number would be lost in a maximum
    return float(difference / scale) if scale > 0 else (inf if difference > 0 else 0.0)
