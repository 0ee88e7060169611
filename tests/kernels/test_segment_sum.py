"""Sums of rows by key against numpy, bit for bit: both add in order of appearance."""

from typing import Any

import numba
import numpy as np
import pytest
from numpy.typing import NDArray

from engram_kernels.segment_sum import sum_pieces

Reference = tuple[NDArray[np.int64], NDArray[Any]]


def _reference(keys: NDArray[np.int64], values: NDArray[Any]) -> Reference:
    rows, inverse = np.unique(keys, return_inverse=True)
    sums = np.zeros((rows.size, values.shape[1]), values.dtype)
    np.add.at(sums, inverse, values)  # one after another
    return rows, sums


def _example(dtype: str, size: int, dim: int = 7) -> Reference:
    rng = np.random.default_rng(size)
    return rng.integers(0, max(1, size // 3), size), rng.standard_normal((size, dim)).astype(dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("size", "dim"), [(0, 3), (1, 3), (2000, 1), (2000, 80)])
def test_sums_run_in_order_of_appearance(dtype: str, size: int, dim: int) -> None:
    keys, values = _example(dtype, size, dim)
    rows, sums, _ = sum_pieces(keys, [values])
    expected_rows, expected_sums = _reference(keys, values)
    np.testing.assert_array_equal(rows, expected_rows)
    np.testing.assert_array_equal(sums, expected_sums)
    assert sums.dtype == np.dtype(dtype)


def test_rows_are_added_in_the_order_of_the_input() -> None:
    # In any other order of the three rows of key 4, 1 is lost beside 1e8 or is not.
    keys = np.array([4, 2, 4, 9, 4])
    values = np.array([[1e8], [5.0], [-1e8], [7.0], [1.0]], np.float32)
    rows, sums, _ = sum_pieces(keys, [values])
    assert rows.tolist() == [2, 4, 9]
    assert sums[:, 0].tolist() == [5.0, 1.0, 7.0]


def test_pieces_are_one_array_that_was_never_put_together() -> None:
    keys, values = _example("float32", 1000)
    pieces = [values[:10], values[10:10], values[10:700:1], values[700:]]
    found = sum_pieces(keys, pieces)
    for ours, theirs in zip(found, sum_pieces(keys, [values]), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_piece_may_be_a_view_with_gaps() -> None:
    keys, values = _example("float32", 500)
    wide = np.concatenate([values, values], axis=1)
    np.testing.assert_array_equal(sum_pieces(keys, [wide[:, :7]]).sums, sum_pieces(keys, [values]).sums)


def test_norms_are_those_of_the_sums_in_float64() -> None:
    keys, values = _example("float32", 1000, 80)
    values *= np.float32(1e19)  # whose squares overflow float32
    found = sum_pieces(keys, [values])
    expected = (found.sums.astype(np.float64) ** 2).sum(axis=1)
    np.testing.assert_allclose(found.squared_norms, expected, rtol=1e-14, atol=0)  # 80 roundings of 1e-16


def test_result_is_the_same_for_any_number_of_threads() -> None:
    keys, values = _example("float32", 200_000)
    threads = numba.get_num_threads()
    results = []
    for number in (1, threads):
        numba.set_num_threads(number)
        results.append(sum_pieces(keys, [values]))
    for ours, theirs in zip(*results, strict=True):
        np.testing.assert_array_equal(ours, theirs)
