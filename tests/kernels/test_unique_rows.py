"""Distinct row ids, their inverse and their groups, against numpy."""

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from engram_kernels.unique_rows import group_rows, unique_rows

Int64 = NDArray[np.int64]


def _check(ids: Int64) -> None:
    rows, inverse = unique_rows(ids)
    expected_rows, expected_inverse = np.unique(ids, return_inverse=True)
    np.testing.assert_array_equal(rows, expected_rows)
    np.testing.assert_array_equal(inverse, expected_inverse)
    assert rows.dtype == inverse.dtype == np.int64
    groups = group_rows(ids)
    np.testing.assert_array_equal(groups.rows, expected_rows)
    np.testing.assert_array_equal(groups.positions, np.argsort(ids, kind="stable"))
    np.testing.assert_array_equal(np.diff(groups.starts), np.bincount(expected_inverse))


@settings(deadline=None, max_examples=200)  # the first example compiles the kernels
@given(st.lists(st.integers(-5, 40)) | st.lists(st.integers(-(2**40), 2**40)) | st.lists(st.just(7), max_size=300))
def test_equals_numpy(ids: list[int]) -> None:
    _check(np.array(ids, np.int64))


@pytest.mark.parametrize("highest", [1, 300, 72_404_232, 2**40])
@pytest.mark.parametrize("size", [5_000, 300_001])
def test_equals_numpy_on_many_ids(size: int, highest: int) -> None:
    _check((np.random.default_rng(size).random(size) ** 3 * highest).astype(np.int64))


def test_result_is_the_same_for_any_number_of_threads() -> None:
    ids = np.random.default_rng(0).integers(0, 100_000, 300_001)
    threads = numba.get_num_threads()
    results = []
    for number in (1, threads):
        numba.set_num_threads(number)
        groups = group_rows(ids)
        results.append([*unique_rows(ids), groups.starts, groups.positions])
    for ours, theirs in zip(*results, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_ids_may_be_a_view() -> None:
    _check(np.random.default_rng(0).integers(0, 50, (100, 3))[:, 1])


def test_ids_too_far_apart_for_a_key_are_an_error() -> None:
    with pytest.raises(AssertionError, match="do not fit"):
        unique_rows(np.array([0, 2**62, 5], np.int64))
