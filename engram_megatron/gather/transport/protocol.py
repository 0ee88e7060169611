"""What a transport is. Every call is collective: all ranks of the group make the same calls in the same order, also
those with nothing to send. A transport may be driven from a thread of its own, one thread at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray


class TransportError(RuntimeError):
    """What arrived cannot be what was sent, or did not arrive. The job must stop: nothing on this rank is to be
    trusted, and it issues no further collective."""


@dataclass(frozen=True)
class Member:
    """A rank of a transport as a person knows it: its number in the whole job, and its host."""

    rank: int
    host: str

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.host})"


class Transport(Protocol):
    """An all-to-all between the `size` ranks of a group, numbered from 0. Tensors live on the CPU."""

    rank: int
    size: int

    def exchange_counts(self, counts: NDArray[np.int64]) -> NDArray[np.int64]:
        """counts[r] goes to rank r; the result's entry r came from rank r. Both int64 [size]."""

    def exchange(
        self,
        rows: torch.Tensor,
        send_counts: NDArray[np.int64],
        receive_counts: NDArray[np.int64],
        *,
        what: str = "rows",
    ) -> torch.Tensor:
        """`rows` [sum(send_counts), ...] goes out in pieces of `send_counts[r]` to rank r; the result
        [sum(receive_counts), ...] holds what came from rank 0, 1, ... one after another. Counts may be zero. Errors
        call the rows `what`."""


class LoopbackTransport:
    """The exchange of a single rank with itself."""

    rank = 0
    size = 1

    def exchange_counts(self, counts: NDArray[np.int64]) -> NDArray[np.int64]:
        return counts.copy()

    def exchange(
        self,
        rows: torch.Tensor,
        send_counts: NDArray[np.int64],
        receive_counts: NDArray[np.int64],
        *,
        what: str = "rows",
    ) -> torch.Tensor:
        assert send_counts.tolist() == receive_counts.tolist() == [rows.shape[0]]
        return rows


def row_bytes(rows: torch.Tensor) -> int:
    """Bytes of one row, an entry of the first dimension; a tensor [n] has rows of one element."""
    return rows.element_size() * rows.shape[1:].numel()


def byte_view(rows: torch.Tensor) -> NDArray[np.uint8]:
    """The memory of a contiguous CPU tensor, uint8 [bytes]; no copy."""
    assert rows.device.type == "cpu", rows.device
    assert rows.is_contiguous(), rows.stride()
    # a lone element counts as contiguous whatever its stride, and `view` looks at that
    flat = rows.detach().as_strided((rows.numel(),), (1,))
    view: NDArray[np.uint8] = flat.view(torch.uint8).numpy()
    return view
