"""The exchange over TCP, by torch's gloo."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from engram_megatron.gather.transport.protocol import result_tensor


class GlooTransport:
    """All-to-all over TCP between hosts' memories, whatever device the model is on.

    `group` is a gloo group that nothing else uses: collectives of the backbone never queue behind these, nor these
    behind them, and a thread of its own may drive it. It may hold any of the job's ranks, this one among them. An
    exchange that takes longer than the group's timeout raises torch's RuntimeError.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)

    def start_numbers(self, numbers: NDArray[np.int64]) -> Callable[[], NDArray[np.int64]]:
        received = torch.empty(self.size, dtype=torch.int64, device="cpu")
        work = dist.all_to_all_single(received, torch.from_numpy(numbers), group=self.group, async_op=True)

        def wait() -> NDArray[np.int64]:
            work.wait()
            return received.numpy()

        return wait

    def exchange(
        self,
        rows: torch.Tensor,
        send_counts: NDArray[np.int64],
        receive_counts: NDArray[np.int64],
        *,
        what: str = "rows",
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        assert rows.device.type == "cpu", rows.device
        assert rows.shape[0] == send_counts.sum(), (rows.shape, send_counts)
        received = result_tensor(rows, int(receive_counts.sum()), out)
        dist.all_to_all_single(
            received, rows.contiguous(), receive_counts.tolist(), send_counts.tolist(), group=self.group
        )
        return received
