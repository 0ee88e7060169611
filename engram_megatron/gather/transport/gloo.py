"""The exchange over TCP, by torch's gloo."""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray


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

    def exchange_counts(self, counts: NDArray[np.int64]) -> NDArray[np.int64]:
        one_each = np.ones(self.size, np.int64)
        return self.exchange(torch.from_numpy(counts), one_each, one_each, what="counts").numpy()

    def exchange(
        self,
        rows: torch.Tensor,
        send_counts: NDArray[np.int64],
        receive_counts: NDArray[np.int64],
        *,
        what: str = "rows",
    ) -> torch.Tensor:
        assert rows.device.type == "cpu", rows.device
        assert rows.shape[0] == send_counts.sum(), (rows.shape, send_counts)
        received = torch.empty((int(receive_counts.sum()), *rows.shape[1:]), dtype=rows.dtype, device="cpu")
        dist.all_to_all_single(
            received, rows.contiguous(), receive_counts.tolist(), send_counts.tolist(), group=self.group
        )
        return received
