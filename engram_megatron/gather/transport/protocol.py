"""What a transport is. Every call is collective: all ranks of the group make the same calls in the same order, also
those with nothing to send. A transport may be driven from a thread of its own, one thread at a time.
"""

from __future__ import annotations

from collections.abc import Callable
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

    def exchange(
        self,
        rows: torch.Tensor,
        send_counts: NDArray[np.int64],
        receive_counts: NDArray[np.int64],
        *,
        what: str = "rows",
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`rows` [sum(send_counts), ...] goes out in pieces of `send_counts[r]` to rank r; the result
        [sum(receive_counts), ...] holds what came from rank 0, 1, ... one after another: in `out`, contiguous, where it
        is given. Counts may be zero. Errors call the rows `what`."""


class UncheckedTransport(Transport, Protocol):
    """A transport as the network gives it, which `CheckedTransport` wraps."""

    def start_numbers(self, numbers: NDArray[np.int64]) -> Callable[[], NDArray[np.int64]]:
        """Begin to send numbers[r] (int64 [size]) to rank r, beside the exchange that follows; the result, called after
        that exchange, waits for what came from all ranks, int64 [size]."""


class LoopbackTransport:
    """The exchange of a single rank with itself."""

    rank = 0
    size = 1

    def exchange(
        self,
        rows: torch.Tensor,
        send_counts: NDArray[np.int64],
        receive_counts: NDArray[np.int64],
        *,
        what: str = "rows",
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        assert send_counts.tolist() == receive_counts.tolist() == [rows.shape[0]]
        return rows if out is None else out.copy_(rows)


def result_tensor(rows: torch.Tensor, num_rows: int, out: torch.Tensor | None) -> torch.Tensor:
    """Where `num_rows` rows like those of `rows` are received: `out`, or a new tensor."""
    shape = (num_rows, *rows.shape[1:])
    if out is None:
        return torch.empty(shape, dtype=rows.dtype, device="cpu")
    assert (tuple(out.shape), out.dtype) == (shape, rows.dtype), (out.shape, out.dtype, shape, rows.dtype)
    assert out.is_contiguous(), out.stride()
    return out


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
