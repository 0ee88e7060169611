"""How many rows every head has: distinct primes, so that the heads of an order spread one mix differently."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

# The first twelve primes as bases make Miller-Rabin exact below 3.3e24 (Sorenson and Webster, arXiv 1509.00864).
_MILLER_RABIN_BASES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37)


def is_prime(number: int) -> bool:
    """Whether `number` is prime; exact for every int64."""
    if number < 2:
        return False
    for base in _MILLER_RABIN_BASES:
        if number % base == 0:
            return number == base
    odd, twos = number - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    return all(_passes(number, base, odd, twos) for base in _MILLER_RABIN_BASES)


def _passes(number: int, base: int, odd: int, twos: int) -> bool:
    """One Miller-Rabin round: number - 1 = odd * 2^twos."""
    power = pow(base, odd, number)
    if power in (1, number - 1):
        return True
    for _ in range(twos - 1):
        power = power * power % number
        if power == number - 1:
            return True
    return False


def head_sizes(rows_per_head: Sequence[int], num_layers: int, num_heads_per_order: int) -> NDArray[np.int64]:
    """Rows of every head, int64 [num_layers, orders, num_heads_per_order], chosen as DeepSeek's demo does.

    `rows_per_head[o]` is the least number of rows of a head of order o + 2. Layer by layer, order by order, head by
    head: the next prime at or above that number (first head) or above the head before, skipping every prime that
    any layer or order has taken.
    """
    taken: set[int] = set()
    sizes = np.empty((num_layers, len(rows_per_head), num_heads_per_order), dtype=np.int64)
    for layer in range(num_layers):
        for order, least in enumerate(rows_per_head):
            candidate = least
            for head in range(num_heads_per_order):
                while candidate in taken or not is_prime(candidate):
                    candidate += 1
                taken.add(candidate)
                sizes[layer, order, head] = candidate
    return sizes
