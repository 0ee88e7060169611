"""Every pair of ranks exchanges known bytes before a run begins."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from engram_megatron.gather.transport.checked import CheckedTransport, DamageError
from engram_megatron.gather.transport.protocol import Transport, TransportError

SIZES = (0, 1, 7, 4099, 2**20 + 5)  # bytes
ROUND_BYTES = 2**26
SHOWN_PAIRS = 4


def exercise_pairs(transport: Transport, sizes: Sequence[int] = SIZES, round_bytes: int = ROUND_BYTES) -> None:
    """Send a piece of each of `sizes` bytes from every rank to every rank, itself too, and compare what arrives.

    Collective. In one exchange a rank sends at most `round_bytes` (but a piece at least), so that a large job takes
    more exchanges instead of more memory. All of them are made, also after damage; then each rank tells all others
    what it found.

    Raises:
        TransportError: on every rank, naming pairs between which other bytes arrived than were sent; or on the ranks
            whose exchange failed.
    """
    damaged = np.zeros(transport.size, np.bool_)  # by source
    pieces = max(1, round_bytes // max(1, *sizes))
    for turn in range(len(sizes)):
        for first in range(0, transport.size, pieces):
            damaged |= _exercise(transport, sizes, turn, range(first, min(first + pieces, transport.size)))
    _tell_all(transport, damaged)


def _exercise(transport: Transport, sizes: Sequence[int], turn: int, distances: Sequence[int]) -> NDArray[np.bool_]:
    """One exchange with the ranks at `distances` above and below this one; bool [size], from where damage came."""
    me, ranks = transport.rank, range(transport.size)

    def piece(source: int, destination: int) -> NDArray[np.uint8]:
        if (destination - source) % transport.size not in distances:
            return np.empty(0, np.uint8)
        # pieces of one exchange differ in size, so that they begin at odd places
        size = sizes[(source + destination + turn) % len(sizes)]
        return np.frombuffer(np.random.default_rng([turn, source, destination]).bytes(size), np.uint8)

    outgoing = [piece(me, rank) for rank in ranks]
    expected = [piece(rank, me) for rank in ranks]
    send_counts = np.array([p.size for p in outgoing], np.int64)
    receive_counts = np.array([p.size for p in expected], np.int64)
    damaged = np.zeros(transport.size, np.bool_)
    try:
        damaged |= _tell(transport, send_counts) != receive_counts
    except DamageError as error:
        damaged[list(error.sources)] = True
    rows = torch.from_numpy(np.concatenate(outgoing))
    try:
        received = transport.exchange(rows, send_counts, receive_counts, what="test bytes").numpy()
    except DamageError as error:
        damaged[list(error.sources)] = True
    else:
        parts = np.split(received, np.cumsum(receive_counts)[:-1])
        damaged |= [not np.array_equal(part, p) for part, p in zip(parts, expected, strict=True)]
    return damaged


def _tell_all(transport: Transport, damaged: NDArray[np.bool_]) -> None:
    """Raise on all ranks for what any of them found. Each tells of one source only."""
    found = int(np.flatnonzero(damaged)[0]) if damaged.any() else -1
    try:
        # what goes over a damaged network may be damaged too: then this raises as well
        sources = _tell(transport, np.full(transport.size, found + 1, np.int64)) - 1
    except DamageError as error:
        raise TransportError(f"the exchange of known bytes between all pairs of ranks failed: {error}") from error
    pairs = [f"from {_name(transport, int(s))} to {_name(transport, r)}" for r, s in enumerate(sources) if s >= 0]
    if pairs:
        more = f" and to {len(pairs) - SHOWN_PAIRS} other ranks" if len(pairs) > SHOWN_PAIRS else ""
        raise TransportError(
            f"other bytes arrive than are sent {', '.join(pairs[:SHOWN_PAIRS])}{more}: repair or leave out these hosts "
            "or their network, or choose another transport"
        )


def _tell(transport: Transport, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    one_each = np.ones(transport.size, np.int64)
    told: NDArray[np.int64] = transport.exchange(torch.from_numpy(numbers), one_each, one_each, what="counts").numpy()
    return told


def _name(transport: Transport, rank: int) -> str:
    known = isinstance(transport, CheckedTransport) and 0 <= rank < transport.size
    return str(transport.members[rank]) if known else f"rank {rank}"  # type: ignore[attr-defined]
