"""The order of samples: a pure function of (seed, position), without state and with O(1) memory.

A sample is a window of sequence_length + 1 tokens at offset i * sequence_length: consecutive windows share one token,
so that every token but the first is predicted exactly once an epoch. Position p of a run is its p-th sample; whoever
reads position p (any rank, any layout, after any resume) gets the same sample. Every epoch is a permutation of all
samples, another one each time.

A random window at a time would decode a whole chunk for each. So the plan is
  1. windows that lie in the same chunk form a *group*; the groups of the corpus are permuted;
  2. `POOL_GROUPS` consecutive groups of that order form a *pool*; the windows of a pool are permuted.
A reader that keeps the chunks of one pool decodes every chunk once an epoch.
The windows behind the last whole group, and the groups behind the last whole pool, belong to the last pool.

Permutations of n elements are keyed bijections of k-bit integers, 2^k >= n, walked until they fall below n (a
permutation's cycle that starts below n comes back below n: Black and Rogaway, "Ciphers with Arbitrary Finite
Domains", 2002). One round adds a key, multiplies by an odd number, and folds the high bits into the low ones, all
modulo 2^k: each step can be undone, so each round is a bijection.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

POOL_GROUPS = 256  # x 64k-token chunks: 16.8M tokens are mixed; 67 MB where they are all kept decoded as uint32
ROUNDS = 6
MASK_64 = 2**64 - 1

U64 = NDArray[np.uint64]


def num_samples(num_tokens: int, sequence_length: int) -> int:
    """Whole windows of `sequence_length` + 1 tokens; the rest at the end, shorter than one, is not read."""
    return max(0, (num_tokens - 1) // sequence_length)


def sample_of(seed: int, position: int, num_samples: int, group_size: int, pool_groups: int = POOL_GROUPS) -> int:
    """`samples_of` for one position."""
    return int(samples_of(seed, np.array([position]), num_samples, group_size, pool_groups)[0])


def samples_of(
    seed: int,
    positions: NDArray[np.integer],
    num_samples: int,
    group_size: int,
    pool_groups: int = POOL_GROUPS,
) -> NDArray[np.int64]:
    """Sample indices int64[n], each in 0..num_samples-1, at `positions` int[n] >= 0 of the endless run.

    `group_size`: windows per group; epoch e consists of positions e * num_samples .. (e + 1) * num_samples - 1.
    """
    assert num_samples > 0, num_samples
    assert group_size > 0, group_size
    assert pool_groups > 0, pool_groups
    assert len(positions) == 0 or int(positions.min()) >= 0, positions
    epochs, offsets = np.divmod(positions.astype(np.int64), num_samples)
    epoch_key = _mix(_mix(np.full(len(positions), seed & MASK_64, np.uint64)) + epochs.astype(np.uint64))

    pool_size = group_size * pool_groups
    last_pool = max(1, num_samples // pool_size) - 1
    pools = np.minimum(offsets // pool_size, last_pool)
    pool_starts = pools * pool_size
    pool_sizes = np.where(pools == last_pool, num_samples - pool_starts, pool_size)
    pool_key = _mix(epoch_key + (pools + 1).astype(np.uint64))  # + 0 is the key of the groups
    slots: NDArray[np.int64] = pool_starts + _permute(offsets - pool_starts, pool_sizes, pool_key)

    num_groups = num_samples // group_size
    if num_groups == 0:
        return slots
    groups, windows = np.divmod(slots, group_size)
    in_group = groups < num_groups
    shuffled = _permute(np.where(in_group, groups, 0), np.full(len(slots), num_groups), _mix(epoch_key))
    samples: NDArray[np.int64] = np.where(in_group, shuffled * group_size + windows, slots)
    return samples


def _mix(x: U64) -> U64:
    """A strong hash of 64 bits (splitmix64's finaliser, Steele et al. 2014)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _permute(index: NDArray[np.int64], size: NDArray[np.int64], key: U64) -> NDArray[np.int64]:
    """Element-wise: the image of `index` under the permutation of 0..size-1 that `key` names."""
    bits = np.maximum(np.frexp((size - 1).astype(np.float64))[1], 1).astype(np.uint64)  # frexp: exact below 2^53
    one = np.uint64(1)
    mask = (one << bits) - one
    fold = (bits + one) >> one
    image = index.astype(np.uint64)
    walking = np.ones(len(index), bool)
    while walking.any():
        image[walking] = _rounds(image[walking], mask[walking], fold[walking], key[walking])
        walking = image >= size.astype(np.uint64)
    return image.astype(np.int64)


def _rounds(x: U64, mask: U64, fold: U64, key: U64) -> U64:
    for _ in range(ROUNDS):
        key = _mix(key)
        x = (x + key) & mask
        x = (x * ((key >> np.uint64(32)) | np.uint64(1))) & mask
        x = x ^ (x >> fold)
    return x
