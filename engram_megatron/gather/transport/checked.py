"""Proof that what arrived is what was sent.

Networks and their drivers do deliver other bytes than were sent, without an error: a training job of others received
row ids shifted by a byte over InfiniBand. Ids that are out of range can be refused by their owner; a damaged row or
gradient looks like any other.

Beside every exchange each rank sends every other one a checksum of its piece, 8 bytes, and the receiver recomputes it.
The checksum is a function of the bytes, their positions, both ranks and the number of the exchange, so that a piece
of another rank, place or step is noticed as well. Counts travel with a checksum each, before memory is taken for them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from engram_kernels.checksum import piece_checksums, piece_seeds
from engram_megatron.gather.transport.protocol import Member, Transport, TransportError, byte_view, row_bytes

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

    Raises, from both exchanges:
        DamageError: on each rank that received anything else than was sent, naming both ranks. It has taken part in
            the whole exchange. Ranks that received nothing wrong learn of it when they find this one gone.
        TransportError: `inner` failed with a RuntimeError: a timeout, or a rank that is gone.
    """

    def __init__(self, inner: Transport, members: Sequence[Member]) -> None:
        assert len(members) == inner.size, (len(members), inner.size)
        self.inner = inner
        self.members = tuple(members)
        self.rank = inner.rank
        self.size = inner.size
        self.num_exchanges = 0
        self._job_ranks = np.array([member.rank for member in members], np.int64)

    def exchange_counts(self, counts: Int64) -> Int64:
        what, one_each = "row counts", np.ones(self.size, np.int64)
        self.num_exchanges += 1
        sealed = np.stack([counts, self._count_checksums(counts, sending=True).view(np.int64)], axis=1)
        received = self._pass_on(torch.from_numpy(sealed), one_each, one_each, what).numpy()
        counts, told = np.ascontiguousarray(received[:, 0]), received[:, 1].copy().view(np.uint64)
        self._compare(told, self._count_checksums(counts, sending=False), one_each * counts.itemsize, what)
        assert (counts >= 0).all(), counts
        return counts

    def exchange(
        self, rows: torch.Tensor, send_counts: Int64, receive_counts: Int64, *, what: str = "rows"
    ) -> torch.Tensor:
        self.num_exchanges += 1
        rows = rows.contiguous()
        bytes_each = row_bytes(rows)
        sums = piece_checksums(byte_view(rows), send_counts * bytes_each, self._seeds(sending=True))
        received = self._pass_on(rows, send_counts, receive_counts, what)
        told = self._pass_on_checksums(sums, what)
        sizes = receive_counts * bytes_each
        self._compare(told, piece_checksums(byte_view(received), sizes, self._seeds(sending=False)), sizes, what)
        return received

    def _count_checksums(self, counts: Int64, *, sending: bool) -> Checksums:
        sizes = np.full(self.size, counts.itemsize, np.int64)
        return piece_checksums(counts.view(np.uint8), sizes, self._seeds(sending=sending))

    def _seeds(self, *, sending: bool) -> Checksums:
        own = self._job_ranks[self.rank : self.rank + 1]
        ends = (own, self._job_ranks) if sending else (self._job_ranks, own)
        return piece_seeds(self.num_exchanges, *ends)

    def _pass_on(self, rows: torch.Tensor, send_counts: Int64, receive_counts: Int64, what: str) -> torch.Tensor:
        try:
            return self.inner.exchange(rows, send_counts, receive_counts, what=what)
        except RuntimeError as error:
            raise self._failure(error, what) from error

    def _pass_on_checksums(self, sums: Checksums, what: str) -> Checksums:
        try:
            return self.inner.exchange_counts(sums.view(np.int64)).view(np.uint64)
        except RuntimeError as error:
            raise self._failure(error, f"checksums of {what}") from error

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
