"""Primes against sympy, head sizes against the demo's rule and published totals."""

import time

import numpy as np
import pytest
import sympy
from hypothesis import given
from hypothesis import strategies as st

from engram_megatron.hashing.head_sizes import head_sizes, is_prime


def test_is_prime_agrees_with_sympy_on_small_numbers() -> None:
    assert [n for n in range(-5, 5000) if is_prime(n)] == list(sympy.primerange(5000))


# The least composites that pass Miller-Rabin for the first 1, 4, 7 and 9 prime bases, and the squares of two primes.
@pytest.mark.parametrize("composite", [2047, 3215031751, 341550071728321, 3825123056546413051, 46337**2, 3037000493**2])
def test_is_prime_rejects_strong_pseudoprimes(composite: int) -> None:
    assert not is_prime(composite)


@given(st.integers(min_value=0, max_value=2**63 - 1))
def test_is_prime_agrees_with_sympy_up_to_int64(number: int) -> None:
    assert is_prime(number) == sympy.isprime(number)


@given(
    st.lists(st.integers(min_value=2, max_value=2000), min_size=1, max_size=3),
    st.integers(min_value=1, max_value=3),
    st.integers(min_value=1, max_value=4),
)
def test_heads_take_the_next_prime_that_no_head_has(least: list[int], layers: int, heads: int) -> None:
    sizes = head_sizes(least, layers, heads)
    taken: list[int] = []
    for layer in range(layers):
        for order, start in enumerate(least):
            prime = start - 1
            for head in range(heads):
                prime = sympy.nextprime(prime)
                while prime in taken:
                    prime = sympy.nextprime(prime)
                taken.append(prime)
                assert sizes[layer, order, head] == prime


# Published: DeepSeek-V4.1's engram_num_embeddings; the others reproduce 5.7B and 18.5B parameters at 80 wide.
@pytest.mark.parametrize(
    ("rows", "orders", "totals"),
    [
        (16_000_000, 3, [384006168, 384016682]),
        (2_262_400, 2, [36199972, 36204260]),
        (7_239_680, 2, [115837464, 115841428]),
    ],
)
def test_totals_of_published_models(rows: int, orders: int, totals: list[int]) -> None:
    started = time.perf_counter()
    sizes = head_sizes((rows,) * orders, 2, 8)
    assert time.perf_counter() - started < 1.0
    assert sizes.dtype == np.int64
    assert sizes.sum(axis=(1, 2)).tolist() == totals
