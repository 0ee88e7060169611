"""64-bit checksums of the pieces of a buffer, at the speed of reading it; bit for bit `reference.piece_checksum`.

Every word of a piece goes, together with its position and the piece's seed, through a bijection of 64 bits
(splitmix64's), and the results are added. So the change of a single word always shows, whatever its value; anything
else (words or rows that changed places, bytes moved by one, zeros, a piece cut short, another seed) goes unseen with
probability 2^-64. The sum has no order, so blocks of words are independent: threads and vector units both work on it.

It guards against damage, not against forgery.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

BLOCK_BYTES = 1 << 16  # what a thread takes at a time; a multiple of 8
PARALLEL_BYTES = 1 << 19  # below this, waking threads takes longer than they save

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLY_1 = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLY_2 = np.uint64(0x94D049BB133111EB)
_S27, _S30, _S31 = np.uint64(27), np.uint64(30), np.uint64(31)
_ONE, _EIGHT, _SIXTY_FOUR = np.uint64(1), np.uint64(8), np.uint64(64)

Bytes = NDArray[np.uint8]
Words = NDArray[np.uint64]
Int64 = NDArray[np.int64]


def piece_seeds(number: int, sources: Int64 | int, destinations: Int64 | int) -> Words:
    """Seeds uint64 [P] of pieces that travel from rank `sources` to rank `destinations` ([P], or one for all) in
    exchange `number`: each a function of all three."""
    with np.errstate(over="ignore"):  # scalars of numpy warn where arrays wrap silently
        seeds = _mix(np.atleast_1d(np.asarray(number, dtype=np.uint64)) + _GOLDEN)
        for ranks in (sources, destinations):
            seeds = _mix(seeds + np.atleast_1d(np.asarray(ranks)).astype(np.uint64) * _GOLDEN)
    return np.asarray(seeds)


def piece_checksums(data: Bytes, sizes: Int64, seeds: Words) -> Words:
    """Checksums uint64 [P] of the pieces of `data`, uint8 [sum(sizes)], that lie one after another.

    `sizes` int64 [P] in bytes, zeros allowed; `seeds` uint64 [P] from `piece_seeds`. Runs on numba's threads where
    `data` is large and releases the GIL; the first call of a process loads or compiles the machine code.
    """
    assert data.dtype == np.uint8, data.dtype
    assert data.flags.c_contiguous, data.strides
    assert data.size == sizes.sum(), (data.size, sizes)
    assert sizes.shape == seeds.shape, (sizes.shape, seeds.shape)
    if data.ctypes.data % 8:
        data = data.copy()  # numpy aligns what it allocates
    words = data[: data.size // 8 * 8].view(np.uint64)
    starts = np.cumsum(sizes) - sizes
    sums = np.zeros(sizes.size, np.uint64)
    if data.size < PARALLEL_BYTES:
        _sum_pieces(data, words, starts, sizes, seeds, sums)
    else:
        blocks = -(-sizes // BLOCK_BYTES)
        pieces = np.repeat(np.arange(sizes.size), blocks)
        firsts = (np.arange(pieces.size) - np.repeat(np.cumsum(blocks) - blocks, blocks)) * BLOCK_BYTES
        block_sums = np.empty(pieces.size, np.uint64)
        _sum_blocks(data, words, starts, sizes, seeds, pieces, firsts, block_sums)
        np.add.at(sums, pieces, block_sums)
    return np.asarray(_mix(sums + _mix(seeds + sizes.astype(np.uint64))))


def _mix(x: Any) -> Any:
    """splitmix64's finalizer (Steele, Lea, Flood 2014): a bijection in which every bit of the result depends on every
    bit of `x`."""
    x = (x ^ (x >> _S30)) * _MULTIPLY_1
    x = (x ^ (x >> _S27)) * _MULTIPLY_2
    return x ^ (x >> _S31)


_mix_word = numba.njit(_mix, inline="always")


@numba.njit(nogil=True, cache=True)
def _sum_pieces(data: Bytes, words: Words, starts: Int64, sizes: Int64, seeds: Words, sums: Words) -> None:
    for p in range(sizes.size):
        sums[p] = _sum_part(data, words, starts[p], 0, sizes[p], seeds[p])


@numba.njit(nogil=True, cache=True, parallel=True)
def _sum_blocks(
    data: Bytes,
    words: Words,
    starts: Int64,
    sizes: Int64,
    seeds: Words,
    pieces: Int64,
    firsts: Int64,
    block_sums: Words,
) -> None:
    for b in numba.prange(pieces.size):
        p = pieces[b]
        stop = min(firsts[b] + BLOCK_BYTES, sizes[p])
        block_sums[b] = _sum_part(data, words, starts[p], firsts[b], stop, seeds[p])


@numba.njit(nogil=True, cache=True)
def _sum_part(data: Bytes, words: Words, start: int, first: int, stop: int, seed: np.uint64) -> np.uint64:
    """The words of bytes first..stop - 1 of the piece that begins at `start`; `first` is a multiple of 8, and `stop`
    another or the piece's end, where missing bytes count as zero."""
    begin = start + first
    word = begin // 8
    shift = np.uint64(begin % 8) * _EIGHT
    key = seed + np.uint64(first // 8) * _GOLDEN
    total = np.uint64(0)
    if shift == 0:
        whole = (stop - first) // 8
        part = words[word : word + whole]
        for i in range(part.size):
            total += _mix_word(part[i] ^ (key + np.uint64(i) * _GOLDEN))
    else:
        # a word of the piece lies in two of the buffer, the second of which must exist
        whole = max(0, min((stop - first) // 8, words.size - word - 1))
        part, next_part = words[word : word + whole], words[word + 1 : word + 1 + whole]
        for i in range(part.size):
            value = (part[i] >> shift) | (next_part[i] << (_SIXTY_FOUR - shift))
            total += _mix_word(value ^ (key + np.uint64(i) * _GOLDEN))
    for i in range(whole, (stop - first + 7) // 8):
        value = np.uint64(0)
        for byte in range(begin + 8 * i, min(begin + 8 * i + 8, start + stop)):
            value |= np.uint64(data[byte]) << (np.uint64(byte - begin - 8 * i) * _EIGHT)
        total += _mix_word(value ^ (key + np.uint64(i) * _GOLDEN))
    return total
