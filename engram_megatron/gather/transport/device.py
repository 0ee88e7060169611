"""The exchange of host tensors through the ranks' devices: over NCCL where the network belongs to the GPUs.

Not run on a GPU yet; over gloo with the device "cpu" it is the same code without streams.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from engram_megatron.gather.transport.protocol import byte_view, row_bytes


class DeviceTransport:
    """All-to-all between devices' memories of tensors that begin and end on the host.

    Rows are copied to page-locked memory, from there to the device, exchanged as bytes, and copied back to page-locked
    memory, on a stream of its own. While an exchange runs, the device holds what is sent and what is received.

    `group` is a group that nothing else uses, NCCL for `device` cuda and gloo for cpu; torch ends the process when a
    NCCL exchange takes longer than the group's timeout.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self.group = group
        self.device = device
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._staging = self._host_buffer(0)

    def start_numbers(self, numbers: NDArray[np.int64]) -> Callable[[], NDArray[np.int64]]:
        with self._on_stream():
            sent = torch.from_numpy(numbers).to(self.device)
            received = torch.empty_like(sent)
            dist.all_to_all_single(received, sent, group=self.group)

        def wait() -> NDArray[np.int64]:
            with self._on_stream():
                return received.cpu().numpy()

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
        """As of `Transport`; without `out` the result is page-locked where the device is a GPU."""
        assert rows.device.type == "cpu", rows.device
        assert rows.shape[0] == send_counts.sum(), (rows.shape, send_counts)
        bytes_each = row_bytes(rows)
        outgoing = self._stage(rows)
        incoming = self._host_buffer(int(receive_counts.sum()) * bytes_each)
        # The stream belongs to the thread that enters it, which need not be the one that made it.
        with self._on_stream():
            sent = outgoing.to(self.device, non_blocking=True)
            received = torch.empty(incoming.numel(), dtype=torch.uint8, device=self.device)
            dist.all_to_all_single(
                received,
                sent,
                (receive_counts * bytes_each).tolist(),
                (send_counts * bytes_each).tolist(),
                group=self.group,
            )
            incoming.copy_(received, non_blocking=True)
        if self._stream is not None:
            self._stream.synchronize()
        result = incoming.view(rows.dtype).reshape(int(receive_counts.sum()), *rows.shape[1:])
        return result if out is None else out.copy_(result)

    def _stage(self, rows: torch.Tensor) -> torch.Tensor:
        """The bytes of `rows` in page-locked memory, which the next call overwrites."""
        flat = torch.from_numpy(byte_view(rows.contiguous()))
        if self._stream is None:
            return flat
        if self._staging.numel() < flat.numel():
            self._staging = self._host_buffer(flat.numel() * 5 // 4)  # sizes differ a little from step to step
        return self._staging[: flat.numel()].copy_(flat)

    def _host_buffer(self, num_bytes: int) -> torch.Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, device="cpu", pin_memory=self._stream is not None)

    def _on_stream(self) -> AbstractContextManager[Any]:
        return contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
