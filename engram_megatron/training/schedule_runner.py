"""Forward and backward of all microbatches of a step through megatron-core's schedule: one after another, 1F1B over
pipeline stages, or interleaved 1F1B over chunks."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn

from engram_megatron import platform
from engram_megatron.config import RunConfig
from engram_megatron.model.parameter_names import unwrapped
from engram_megatron.training.forward_step import Microbatch, forward_step
from engram_megatron.training.pipeline_communication import StreamCommunicator


@dataclass(frozen=True, kw_only=True)
class LossSums:
    """Sums over the microbatches of one rank, in nats, and the tokens that they are over; zeros except on the last
    pipeline stage. `mtp_...`: multi-token prediction, zeros without it and in evaluation."""

    loss: float
    tokens: int
    mtp_loss: float
    mtp_tokens: int


class ScheduleRunner:
    """Runs microbatches and sums their losses. Gradients end up in DDP's buffers, summed over replicas.

    They are *not* yet divided by the number of tokens: megatron-core would divide by a float32 reciprocal; the
    trainer folds the division into the clip coefficient instead.
    """

    def __init__(self, chunks: Sequence[nn.Module], config: RunConfig) -> None:
        """`chunks`: those of this rank, wrapped in DDP, sharing one megatron-core config."""
        self.chunks = list(chunks)
        self.config = config
        self.expert_tokens: dict[int, Tensor] = {}  # layer number to tokens per expert of this rank's last step
        # When the last backward ended, before replicas sum gradients; of `time.perf_counter`.
        self.gradients_ready = 0.0
        megatron: Any = self.chunks[0].config
        megatron.finalize_model_grads_func = self._finalize
        self._run = get_forward_backward_func()
        self._groups: dict[str, Any] = {}
        if config.parallel.pipeline > 1:
            group = parallel_state.get_pipeline_model_parallel_group()
            communicator = StreamCommunicator(group, megatron, config.model.mhc.num_streams)
            groups = ProcessGroupCollection.use_mpu_process_groups()
            self._groups = {"p2p_communicator": communicator, "pg_collection": groups}

    def train(self, microbatches: Sequence[Iterator[Microbatch]], count: int) -> LossSums:
        """Forward and backward of `count` microbatches, given once for each chunk."""
        return self._sums(self._schedule(microbatches, count, forward_only=False))

    @torch.no_grad()
    def evaluate(self, microbatches: Sequence[Iterator[Microbatch]], count: int) -> LossSums:
        """Forward only; the router's balancing statistics are untouched."""
        for chunk in self.chunks:
            chunk.eval()
        sums = self._sums(self._schedule(microbatches, count, forward_only=True))
        for chunk in self.chunks:
            chunk.train()
        return sums

    def _schedule(
        self, microbatches: Sequence[Iterator[Microbatch]], count: int, *, forward_only: bool
    ) -> list[dict[str, Tensor]]:
        assert len(microbatches) == len(self.chunks)
        result: Any = self._run(
            forward_step_func=partial(forward_step, mtp_loss_weight=self.config.model.mtp.loss_weight),
            data_iterator=list(microbatches),
            model=self.chunks,
            num_microbatches=count,
            seq_length=self.config.data.sequence_length,
            micro_batch_size=self.config.training.micro_batch_size,
            forward_only=forward_only,
            **self._groups,
        )
        return list(result)

    def _finalize(self, chunks: list[nn.Module], _num_tokens: Tensor | None, **kwargs: Any) -> None:
        platform.synchronize()
        self.gradients_ready = time.perf_counter()
        self.expert_tokens = {
            module.layer_number: module.local_tokens_per_expert.clone()  # type: ignore[union-attr, operator, misc]
            for chunk in self.chunks
            for module in chunk.modules()
            if hasattr(module, "local_tokens_per_expert")
        }
        finalize_model_grads(chunks, None, **kwargs)
        if self.config.model.mtp.num_layers > 0 and self.config.parallel.pipeline > 1:
            sum_embedding_gradients(chunks)

    @staticmethod
    def _sums(losses: list[dict[str, Tensor]]) -> LossSums:
        def total(name: str) -> Any:
            return sum(item[name].item() for item in losses if name in item)

        return LossSums(
            loss=float(total("loss_sum")),
            tokens=int(total("tokens")),
            mtp_loss=float(total("mtp_loss_sum")),
            mtp_tokens=int(total("mtp_tokens")),
        )


def sum_embedding_gradients(chunks: Sequence[nn.Module]) -> None:
    """Give the first stage's embedding and the copy of multi-token prediction on the last stage the sum of their
    gradients. Collective over the first and the last stage of a pipeline; other stages have neither."""
    for chunk in map(unwrapped, chunks):
        if hasattr(chunk, "embedding"):
            gradient = chunk.embedding.word_embeddings.weight.main_grad
            dist.all_reduce(gradient, group=parallel_state.get_embedding_group())
