"""The checksum of pieces: bit for bit the plain definition, and different after every kind of damage."""

from collections.abc import Callable

import numba
import numpy as np
import pytest
from numpy.typing import NDArray

from engram_kernels.checksum import BLOCK_BYTES, PARALLEL_BYTES, piece_checksums, piece_seeds
from engram_kernels.reference import piece_checksum

Bytes = NDArray[np.uint8]


def _draw(size: int, seed: int = 0) -> Bytes:
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)


def _checksum(data: Bytes, number: int = 1, source: int = 0, destination: int = 1) -> int:
    return int(piece_checksums(data, np.array([data.size]), piece_seeds(number, source, destination))[0])


@pytest.mark.parametrize(
    "sizes",
    [
        [],
        [0],
        [0, 8, 0, 16],
        [1, 2, 3, 4, 5, 6, 7, 9],
        [15, 64, 1, 800, 7, 0],
        [BLOCK_BYTES * 8, BLOCK_BYTES - 8, 3],
        [13, BLOCK_BYTES * 9 + 5, 2 * BLOCK_BYTES, 1],
    ],
)
@pytest.mark.parametrize("offset", [0, 8, 3])
def test_checksums_are_those_of_the_definition(sizes: list[int], offset: int) -> None:
    data = _draw(sum(sizes) + offset)[offset:]  # the buffer itself may begin anywhere
    seeds = piece_seeds(7, np.arange(len(sizes)), 5)
    ends = np.cumsum(sizes).astype(int)
    pieces = [data[end - size : end].tobytes() for end, size in zip(ends, sizes, strict=True)]
    expected = [piece_checksum(piece, int(seed)) for piece, seed in zip(pieces, seeds, strict=True)]
    assert piece_checksums(data, np.array(sizes, np.int64), seeds).tolist() == expected


def test_number_of_threads_does_not_matter() -> None:
    data = _draw(3 * PARALLEL_BYTES + 11)
    sizes, seeds = np.array([PARALLEL_BYTES + 3, 2 * PARALLEL_BYTES + 8]), piece_seeds(1, 0, np.arange(2))
    before = numba.get_num_threads()
    results = []
    for threads in range(1, before + 1):
        numba.set_num_threads(threads)
        results.append(piece_checksums(data, sizes, seeds).tolist())
    numba.set_num_threads(before)
    assert all(result == results[0] for result in results)


def _moved_by(amount: int) -> Callable[[Bytes], Bytes]:
    return lambda data: np.roll(data, amount)


def _swapped(one: int, other: int, size: int) -> Callable[[Bytes], Bytes]:
    def swap(data: Bytes) -> Bytes:
        data[one : one + size], data[other : other + size] = (
            data[other : other + size].copy(),
            data[one : one + size].copy(),
        )
        return data

    return swap


def _zeroed(start: int, stop: int) -> Callable[[Bytes], Bytes]:
    def zero(data: Bytes) -> Bytes:
        data[start:stop] = 0
        return data

    return zero


@pytest.mark.parametrize(
    "damage",
    [
        *(_moved_by(n) for n in (1, -1, 8, 64, 160)),
        *(_swapped(0, other, 8) for other in (8, 16, 64, 512, 4096, 2**15)),
        *(_swapped(320, 320 + 160 * n, 160) for n in (1, 2, 128)),
        _swapped(0, 2, 2),
        _zeroed(0, 8),
        _zeroed(39_992, 40_000),
        _zeroed(0, 40_000),
        lambda data: data[:-1],
        lambda data: data[:-160],
        lambda data: data[1:],
        lambda data: np.append(data, np.uint8(0)),
        lambda data: np.append(np.uint8(0), data),
    ],
)
def test_damage_of_every_kind_changes_the_checksum(damage: Callable[[Bytes], Bytes]) -> None:
    ids = np.arange(1, 5001, dtype=np.int64) * 0x10203
    for data in (_draw(40_000), ids.view(np.uint8)):
        assert _checksum(damage(data.copy())) != _checksum(data)


def test_every_single_bit_counts() -> None:
    data = _draw(203)
    sums = {_checksum(data)}
    for bit in range(data.size * 8):
        flipped = data.copy()
        flipped[bit // 8] ^= 1 << bit % 8
        sums.add(_checksum(flipped))
    assert len(sums) == data.size * 8 + 1


def test_two_flipped_signs_do_not_cancel() -> None:
    """The weakness of sums of products: highest bits cancel in pairs, whatever odd number they are multiplied by."""
    data = np.zeros(64, np.int64)
    sums = set()
    for one in range(64):
        for other in range(one):
            flipped = data.copy()
            flipped[[one, other]] ^= np.int64(-(2**63))
            sums.add(_checksum(flipped.view(np.uint8)))
    assert len(sums) == 64 * 63 // 2


def test_zeros_of_different_length_differ() -> None:
    assert len({_checksum(np.zeros(n, np.uint8)) for n in range(300)}) == 300


def test_seed_tells_exchanges_sources_and_destinations_apart() -> None:
    ranks = np.arange(20)
    seeds = {int(seed) for number in range(20) for source in range(20) for seed in piece_seeds(number, source, ranks)}
    assert len(seeds) == 20**3
    assert piece_seeds(3, ranks, 7)[4] == piece_seeds(3, 4, ranks)[7]
    empty = np.empty(0, np.uint8)
    assert _checksum(empty, source=2, destination=3) != _checksum(empty, source=3, destination=2)
