"""The compiled hash equals its numpy definition, bit for bit."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from engram_kernels import reference
from engram_kernels.ngram_hash import SMALLEST_RECIPROCAL_PRIME, ngram_hash

INT64_MAX = 2**63 - 1

# tokens, document ids, multipliers, primes
Geometry = tuple[NDArray[np.int64], NDArray[np.int32] | None, NDArray[np.int64], NDArray[np.int64]]


def both(
    tokens_BT: NDArray[np.int64],
    documents_BT: NDArray[np.int32] | None,
    multipliers_LN: NDArray[np.int64],
    primes_LOJ: NDArray[np.int64],
    pad_id: int = 2,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    L, orders, J = primes_LOJ.shape
    offsets_LH = np.arange(L * orders * J, dtype=np.int64).reshape(L, -1) * 1000
    arguments = (tokens_BT, documents_BT, multipliers_LN, primes_LOJ, offsets_LH, pad_id)
    return ngram_hash(*arguments), reference.ngram_hash(*arguments)


@st.composite
def geometries(draw: st.DrawFn) -> Geometry:
    B, T = draw(st.integers(1, 3)), draw(st.integers(0, 12))
    L, N, J = draw(st.integers(1, 2)), draw(st.integers(2, 4)), draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    vocab = draw(st.sampled_from([3, 3204, 99092]))
    lowest = -5 if draw(st.booleans()) else 0
    # only two ids, so that they come again after another document
    documents = rng.integers(0, 2, size=(B, T)).astype(np.int32) if draw(st.booleans()) else None
    multipliers = rng.integers(0, INT64_MAX // vocab // 2, size=(L, N)) * 2 + 1
    smallest = draw(st.sampled_from([2, SMALLEST_RECIPROCAL_PRIME, 16_000_000, 2**40]))
    moduli = rng.integers(smallest, 2 * smallest, size=(L, N - 1, J))
    return rng.integers(lowest, vocab, size=(B, T)), documents, multipliers, moduli


@settings(deadline=None, max_examples=200)  # the first example compiles the kernel
@given(geometries())
def test_equals_the_definition(geometry: Geometry) -> None:
    ours, expected = both(*geometry)
    np.testing.assert_array_equal(ours, expected)


def test_remainder_is_exact_at_multiples_of_the_prime_of_either_sign_up_to_the_largest_mix() -> None:
    # with a zero before it (pad 0) the mix is the token itself; the multiples of a prime are where a rounded quotient
    # would fall on the wrong side
    for prime in (8209, 16_000_057, 1_099_511_627_791):
        largest = INT64_MAX // prime
        quotients = np.unique(np.concatenate([np.arange(50), largest - np.arange(50), largest // 3 + np.arange(50)]))
        near = [quotients * prime, quotients[1:] * prime - 1, -quotients * prime, -quotients[:-1] * prime - 1]
        values = np.concatenate([*near, [INT64_MAX]])
        tokens_BT = values[:, None].astype(np.int64)
        ours, expected = both(tokens_BT, None, np.ones((1, 2), dtype=np.int64), np.array([[[prime]]]), pad_id=0)
        np.testing.assert_array_equal(ours, expected)
        assert ours.reshape(-1).tolist() == [int(value) % prime for value in values]


def test_document_that_comes_again_does_not_see_its_first_part() -> None:
    tokens = np.array([[10, 20, 30]])
    documents = np.array([[1, 2, 1]], dtype=np.int32)
    for rows in both(tokens, documents, np.array([[3, 5, 7]]), np.full((1, 2, 1), 9973)):
        assert rows[0, 0, 2].tolist() == [(30 * 3) ^ (2 * 5), ((30 * 3) ^ (2 * 5) ^ (2 * 7)) + 1000]
