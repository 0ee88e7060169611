"""What passes between pipeline stages: all residual streams of a microbatch in one tensor."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator


class StreamCommunicator(P2PCommunicator):
    """megatron-core's communicator for tensors [T, B, M * C] where its schedules count on [T, B, C].

    Every message has that one shape, so none has to be told to the receiver first.
    """

    def __init__(self, group: dist.ProcessGroup, config: Any, num_streams: int) -> None:
        super().__init__(group, config)
        self.num_streams = num_streams

    def _communicate(self, *, tensor_shape: Any, **what: Any) -> Any:
        if tensor_shape is not None:  # None: nothing is received
            *leading, width = tensor_shape
            tensor_shape = (*leading, width * self.num_streams)
        return super()._communicate(tensor_shape=tensor_shape, **what)
