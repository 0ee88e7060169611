"""Whole tensors from shards, and that a comparison finds what is wrong."""

from __future__ import annotations

import numpy as np
import pytest

from engram_megatron.layouts.compare import (
    DisagreementError,
    drift,
    largest_difference,
    live,
    whole_table,
    whole_tensors,
)
from engram_megatron.layouts.records import Rows, Shard

WHOLE = np.arange(24.0).reshape(6, 4)


def test_shards_are_joined_along_their_dimension() -> None:
    for dim in (0, 1):
        parts = [{"w": Shard(half, dim, rank)} for rank, half in enumerate(np.split(WHOLE, 2, axis=dim))]
        np.testing.assert_array_equal(whole_tensors(reversed(parts))["w"], WHOLE)


def test_gate_and_up_halves_are_put_back_in_order() -> None:
    gate, up = WHOLE[:3], WHOLE[3:]
    name = "mlp.linear_fc1.weight"
    parts = [{name: Shard(np.concatenate([gate[r : r + 1], up[r : r + 1]]), 0, r)} for r in range(3)]
    np.testing.assert_array_equal(whole_tensors(parts)[name], WHOLE)


def test_ranks_that_differ_in_the_last_bit_are_found() -> None:
    other = WHOLE.copy()
    other[0, 0] = np.nextafter(other[0, 0], 1)
    with pytest.raises(DisagreementError, match="w is not the same on all ranks that hold it"):
        whole_tensors([{"w": Shard(WHOLE, None, 0)}, {"w": Shard(other, None, 1)}])


def test_rows_of_all_ranks_make_the_table() -> None:
    parts = [
        Rows(np.array([4, 0]), WHOLE[[4, 0]]),
        Rows(np.array([], np.int64), WHOLE[:0]),
        Rows(np.array([2]), WHOLE[[2]]),
    ]
    expected = WHOLE.copy()
    expected[[1, 3, 5]] = 0
    np.testing.assert_array_equal(whole_table(parts, 6), expected)


def test_largest_difference_names_the_tensor() -> None:
    theirs = {"small": WHOLE * 1e-6, "large": WHOLE}
    ours = {"small": WHOLE * 1e-6, "large": WHOLE}
    ours["small"] = ours["small"] * (1 + 1e-3)
    found = largest_difference(ours, theirs)
    assert (found.where, found.value) == ("small", pytest.approx(1e-3))
    with pytest.raises(DisagreementError, match="large is on one side only"):
        largest_difference({"small": WHOLE}, theirs)


def test_what_is_not_a_number_is_the_largest_difference() -> None:
    ours = {"a": np.array([np.nan, 1.0]), "b": np.array([0.0])}
    assert largest_difference(ours, {"a": np.ones(2), "b": np.zeros(1)}) == (np.inf, "a")
    assert largest_difference({"b": np.full(1, 1e-30)}, {"b": np.zeros(1)}).value == np.inf
    assert largest_difference({"b": np.zeros(1)}, {"b": np.zeros(1)}).value == 0.0


def test_drift_is_relative_to_the_way_that_was_gone() -> None:
    start = {"w": np.zeros(4), "table": np.zeros(4)}
    theirs = {"w": np.full(4, 2.0), "table": np.full(4, 1e-3)}
    ours = {"w": np.full(4, 2.0), "table": np.full(4, 1.1e-3)}
    assert drift(ours, theirs, start) == pytest.approx(0.1)


@pytest.mark.parametrize("streams", [2, 4])
def test_only_what_rounding_moves_is_left_out(streams: int) -> None:
    rows = 2 * streams + streams**2
    sizes = {"alpha": 3, "bias": rows, "mapping.weight": rows}
    layers = ("decoder.layers.0.mhc_attention", "decoder.layers.1.mhc_attention", "decoder.layers.0.mhc_mlp")
    kept = live({f"{layer}.{name}": np.arange(size) for layer in layers for name, size in sizes.items()})
    for name, size in sizes.items():
        post = [1] if name == "alpha" else list(range(streams, 2 * streams))
        assert kept[f"decoder.layers.0.mhc_attention.{name}"].tolist() == post
        assert all(len(kept[f"{layer}.{name}"]) == size for layer in layers[1:])
