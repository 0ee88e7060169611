"""Exchange of host tensors between all ranks of the job. Nothing here knows what a row is.

Every call is collective: all ranks make the same calls in the same order, also those with nothing to send.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray


class TransportError(RuntimeError):
    """What arrived cannot be what was sent. The job must stop: nothing on this rank is to be trusted."""


class Transport(Protocol):
    """An all-to-all between `size` ranks. Tensors live on the CPU."""

    rank: int
    size: int

    def exchange_counts(self, counts: NDArray[np.int64]) -> NDArray[np.int64]:
        """counts[r] goes to rank r; the result's entry r came from rank r. Both int64 [size]."""

    def exchange(
        self, rows: torch.Tensor, send_counts: NDArray[np.int64], receive_counts: NDArray[np.int64]
    ) -> torch.Tensor:
        """`rows` [sum(send_counts), ...] goes out in pieces of `send_counts[r]` to rank r; the result
        [sum(receive_counts), ...] holds what came from rank 0, 1, ... one after another. Counts may be zero."""


class LoopbackTransport:
    """The exchange of a single rank with itself."""

    rank = 0
    size = 1

    def exchange_counts(self, counts: NDArray[np.int64]) -> NDArray[np.int64]:
        return counts.copy()

    def exchange(
        self, rows: torch.Tensor, send_counts: NDArray[np.int64], receive_counts: NDArray[np.int64]
    ) -> torch.Tensor:
        assert send_counts.tolist() == receive_counts.tolist() == [rows.shape[0]]
        return rows


class GlooTransport:
    """All-to-all over TCP between hosts' memories, whatever device the model is on.

    `group` is a gloo group that nothing else uses: collectives of the backbone never queue behind these, nor these
    behind them, and a thread of its own may drive it.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)

    def exchange_counts(self, counts: NDArray[np.int64]) -> NDArray[np.int64]:
        one_each = np.ones(self.size, np.int64)
        return self.exchange(torch.from_numpy(counts), one_each, one_each).numpy()

    def exchange(
        self, rows: torch.Tensor, send_counts: NDArray[np.int64], receive_counts: NDArray[np.int64]
    ) -> torch.Tensor:
        assert rows.device.type == "cpu", rows.device
        assert rows.shape[0] == send_counts.sum(), (rows.shape, send_counts)
        received = torch.empty((int(receive_counts.sum()), *rows.shape[1:]), dtype=rows.dtype, device="cpu")
        dist.all_to_all_single(
            received, rows.contiguous(), receive_counts.tolist(), send_counts.tolist(), group=self.group
        )
        return received


def all_ranks_transport(timeout_s: float) -> Transport:
    """The transport between all ranks of the default process group, on a gloo group of its own; collective.

    Without a process group, or alone in it, the loopback. An exchange that takes longer than `timeout_s` raises.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return LoopbackTransport()
    return GlooTransport(dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s)))
