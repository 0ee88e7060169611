"""Initial weights: a function of seed and global name, whatever the layout."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
from ranks import run_ranks
from small_run import numbers, small_groups, small_run_config


def _initial(rank: int, world_size: int, expert: int, seeds: tuple[int, ...]) -> dict[int, dict[str, Any]]:
    """Initial parameters that this rank holds, by seed and global name."""
    from engram_megatron.model.builder import build_model_chunks
    from engram_megatron.model.parameter_names import global_named_parameters

    found = {}
    for seed in seeds:
        config = small_run_config(overrides=[f"parallel.expert={expert}", f"training.seed={seed}"])
        small_groups(config, rank, world_size)
        found[seed] = {
            name: numbers(parameter) for name, parameter in global_named_parameters(build_model_chunks(config))
        }
    return found


@cache
def _one_rank() -> dict[int, dict[str, Any]]:
    return run_ranks(_initial, 1, 1, (1, 2))[0]


def test_weights_do_not_depend_on_expert_parallelism() -> None:
    ranks = [found[1] for found in run_ranks(_initial, 2, 2, (1,))]
    whole = _one_rank()[1]
    assert set(ranks[0]) | set(ranks[1]) == set(whole)
    shared = set(ranks[0]) & set(ranks[1])
    assert shared == {name for name in whole if "local_experts" not in name}, "each expert stands on one rank"
    for found in ranks:
        for name, value in found.items():
            np.testing.assert_array_equal(value, whole[name], err_msg=name)


def test_every_matrix_is_drawn_anew_for_its_name_and_seed() -> None:
    first, second = _one_rank()[1], _one_rank()[2]
    std = small_run_config().model.init_std
    drawn = [name for name, value in first.items() if value.ndim == 2 and "mhc_" not in name and ".norm_" not in name]
    assert len(drawn) > 30
    for name in drawn:
        # Five standard errors of a standard deviation and of a mean, from n values.
        n = first[name].size
        assert first[name].std() == pytest.approx(std, rel=5 / np.sqrt(2 * n)), name
        assert abs(first[name].mean()) < 5 * std / np.sqrt(n), name
        assert (first[name] != second[name]).all(), name
    heads = [first[name].ravel()[:8].tolist() for name in drawn]
    assert len({tuple(head) for head in heads}) == len(drawn), "two matrices of equal numbers"


def test_norms_start_at_one_and_silent_parts_at_zero() -> None:
    first = _one_rank()[1]
    ones = [name for name in first if name.endswith("norm.weight") or ".norm_" in name]
    zeros = [name for name in first if name.endswith(("short_conv.weight", "mapping.weight"))]
    # final + 3 layers x (input, latent, before feed-forward) + 2 Engram layers x (query, key, convolution)
    assert len(ones) == 1 + 3 * 3 + 2 * 3
    assert len(zeros) == 2 + 3 * 2
    for name in ones:
        assert (first[name] == 1.0).all(), name
    for name in zeros:
        assert (first[name] == 0.0).all(), name
