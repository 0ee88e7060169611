"""RMSNorm for every place where megatron-core asks for a norm."""

from __future__ import annotations

from typing import Any

import torch

from engram_megatron import platform


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm with megatron-core's constructor.

    megatron-core's `WrappedTorchNorm` rejects sequence parallelism; all that it lacks is the tag that makes
    `finalize_model_grads` sum the weight's gradient over the tensor-parallel group.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-20, **_unused: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=platform.device())
        self.config = config
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
