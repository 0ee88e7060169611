"""Forward and backward of all microbatches of a step through megatron-core's schedule."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from torch import Tensor, nn

from engram_megatron.config import RunConfig
from engram_megatron.training.forward_step import Microbatch, forward_step


class ScheduleRunner:
    """Runs microbatches and sums their losses. Gradients end up in DDP's buffers, summed over replicas.

    They are *not* yet divided by the number of tokens: megatron-core would divide by a float32 reciprocal; the
    trainer folds the division into the clip coefficient instead.
    """

    def __init__(self, model: nn.Module, config: RunConfig) -> None:
        self.model = model
        self.config = config
        self.expert_tokens: dict[int, Tensor] = {}  # layer number to tokens per expert of this rank's last step
        model.config.finalize_model_grads_func = self._finalize  # type: ignore[union-attr]
        self._run = get_forward_backward_func()

    def train(self, microbatches: Iterator[Microbatch], count: int) -> tuple[float, int]:
        """Forward and backward of `count` microbatches; returns this rank's (sum of losses in nats, tokens)."""
        return self._sums(self._schedule(microbatches, count, forward_only=False))

    @torch.no_grad()
    def evaluate(self, microbatches: Iterator[Microbatch], count: int) -> tuple[float, int]:
        """Forward only; the router's balancing statistics are untouched."""
        self.model.eval()
        sums = self._sums(self._schedule(microbatches, count, forward_only=True))
        self.model.train()
        return sums

    def _schedule(
        self, microbatches: Iterator[Microbatch], count: int, *, forward_only: bool
    ) -> list[dict[str, Tensor]]:
        result: Any = self._run(
            forward_step_func=forward_step,
            data_iterator=microbatches,
            model=[self.model],
            num_microbatches=count,
            seq_length=self.config.data.sequence_length,
            micro_batch_size=self.config.training.micro_batch_size,
            forward_only=forward_only,
        )
        return list(result)

    def _finalize(self, model: list[nn.Module], _num_tokens: Tensor | None, **kwargs: Any) -> None:
        self.expert_tokens = {
            module.layer_number: module.local_tokens_per_expert.clone()  # type: ignore[union-attr, operator, misc]
            for module in self.model.modules()
            if hasattr(module, "local_tokens_per_expert")
        }
        finalize_model_grads(model, None, **kwargs)

    @staticmethod
    def _sums(losses: list[dict[str, Tensor]]) -> tuple[float, int]:
        return float(sum(item["loss_sum"] for item in losses)), int(sum(item["tokens"] for item in losses))
