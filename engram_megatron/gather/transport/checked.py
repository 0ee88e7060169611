"""Proof that what arrived is what was sent.

Networks and their drivers do deliver other bytes than were sent, without an error: a training job of others received
row ids shifted by a byte over InfiniBand. Ids that are out of range can be refused by their owner; a damaged row or
gradient looks like any other.

Beside every exchange each rank sends every other one a checksum of its piece, 8 bytes, and the receiver recomputes it.
The checksum is a function of the bytes, their positions, both ranks and the number of the exchange, so that a piece
of another rank, place or step is noticed as well. What a rank sends to itself crosses no network and is not checked.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from engram_kernels.checksum import piece_checksums, piece_seeds
from engram_megatron.gather.transport.protocol import (
    Member,
    TransportError,
    UncheckedTransport,
    byte_view,
    row_bytes,
)

SHOWN_SOURCES = 4

Int64 = NDArray[np.int64]
Checksums = NDArray[np.uint64]


class DamageError(TransportError):
    """Something else arrived than was sent. `sources`: the ranks of the transport from which it came."""

    def __init__(self, message: str, sources: Sequence[int]) -> None:
        super().__init__(message)
        self.sources = tuple(sources)


class CheckedTransport:
    """The exchange of `inner`, with every piece compared with what its sender sent.

    `members[r]` is rank r of the transport, for errors and in the checksum.

    Raises:
        DamageError: on each rank that received anything else than was sent, naming both ranks. It has taken part in
            the whole exchange. Ranks that received nothing wrong learn of it when they find this one gone.
        TransportError: `inner` failed with a RuntimeError: a timeout, or a rank that is gone.
    """

    def __init__(self, inner: UncheckedTransport, members: Sequence[Member]) -> None:
        assert len(members) == inner.size, (len(members), inner.size)
        self.inner = inner
        self.members = tuple(members)
        self.rank = inner.rank
        self.size = inner.size
        self.num_exchanges = 0
        self._job_ranks = np.array([member.rank for member in members], np.int64)

    def exchange(
        self,
        rows: torch.Tensor,
        send_counts: Int64,
        receive_counts: Int64,
        *,
        what: str = "rows",
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        self.num_exchanges += 1
        rows = rows.contiguous()
        sums = self._checksums(rows, send_counts, sending=True)
        try:
            told = self.inner.start_numbers(sums.view(np.int64))
            received = self.inner.exchange(rows, send_counts, receive_counts, what=what, out=out)
            sums = told().view(np.uint64)
        except RuntimeError as error:
            raise self._failure(error, what) from error
        sizes = receive_counts * row_bytes(rows)
        self._compare(sums, self._checksums(received, receive_counts, sending=False), sizes, what)
        return received

    def _checksums(self, rows: torch.Tensor, counts: Int64, *, sending: bool) -> Checksums:
        """Of the pieces of `rows`, [size]; 0 of this rank's own."""
        own = self._job_ranks[self.rank : self.rank + 1]
        ends = (own, self._job_ranks) if sending else (self._job_ranks, own)
        seeds = piece_seeds(self.num_exchanges, *ends)
        data, sizes = byte_view(rows), counts * row_bytes(rows)
        before, after = slice(0, self.rank), slice(self.rank + 1, self.size)
        sums = np.zeros(self.size, np.uint64)
        sums[before] = piece_checksums(data[: sizes[before].sum()], sizes[before], seeds[before])
        sums[after] = piece_checksums(data[data.size - sizes[after].sum() :], sizes[after], seeds[after])
        return sums

    def _failure(self, error: RuntimeError, what: str) -> TransportError:
        reason = " ".join(str(error).split())
        return TransportError(
            f"{self.members[self.rank]} could not exchange {what} with the {self.size - 1} other ranks of its group "
            f"(exchange {self.num_exchanges}): {reason}"
        )

    def _compare(self, told: Checksums, found: Checksums, sizes: Int64, what: str) -> None:
        damaged = np.flatnonzero(told != found)
        if damaged.size == 0:
            return
        source = int(damaged[0])
        others = ""
        if damaged.size > 1:
            shown = ", ".join(str(self.members[r]) for r in damaged[1 : 1 + SHOWN_SOURCES])
            others = f"; so do those from {damaged.size - 1} other ranks: {shown}"
            others += ", ..." if damaged.size > 1 + SHOWN_SOURCES else ""
        raise DamageError(
            f"{self.members[self.rank]} received {what} from {self.members[source]} that differ from what was sent: "
            f"exchange {self.num_exchanges}, {int(sizes[source])} bytes, checksum {int(told[source]):016x} sent, "
            f"{int(found[source]):016x} received{others}; the network or its driver damaged them",
            damaged.tolist(),
        )
