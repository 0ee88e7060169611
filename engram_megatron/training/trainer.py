"""The training loop. One step, in the order that `train_step` writes down:

    read       this rank's microbatches of the global batch, a pure function of the step
    plan       hash those of the next step, tell the owners which rows they need
    compute    forward and backward of all microbatches as their rows arrive; DDP sums gradients over replicas
    agree      loss, token count and stop requests of all ranks; stop on a non-finite loss
    return     row gradients go back to their owners
    clip       one norm over backbone and tables, each gradient counted once
    update     Muon, Adam and row Adam with one learning rate and one scale
    fetch      the rows of the next step, as soon as row Adam is done

Losses are sums over tokens; the division by the global token count is folded into the clip coefficient. Plan, row Adam
and fetch run beside the rest, in a thread of the tables (`conditional_memory`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from engram_data.batch import Batch
from engram_megatron import platform
from engram_megatron.config import RunConfig
from engram_megatron.gather.statistics import GatherStatistics
from engram_megatron.model.flops import token_flops
from engram_megatron.optimizer.backbone import BackboneOptimizer
from engram_megatron.optimizer.schedule import learning_rate_schedule
from engram_megatron.training.conditional_memory import ConditionalMemory, StepRows
from engram_megatron.training.forward_step import Microbatch, make_microbatch
from engram_megatron.training.parallel import Ranks, once_per_replica, sum_over_ranks
from engram_megatron.training.schedule_runner import ScheduleRunner
from engram_megatron.training.step_metrics import (
    expert_metrics,
    gather_metrics,
    layer_metrics,
    rank_metrics,
    table_metrics,
)


class NonFiniteLossError(RuntimeError):
    """The loss or the gradient norm is not a number; the optimizer has not moved."""


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one step found, the same on every rank but for this rank's times."""

    loss: float  # nats per token of the global batch
    mtp_loss: float | None  # of multi-token prediction alone, nats per token that it predicts, without its weight
    gradient_norm: float  # of the loss per token, over backbone and tables
    learning_rate: float
    num_tokens: int  # whose loss counted
    stop_requests: int  # ranks that were asked to stop
    seconds: float
    gather_wait_s: float
    compute_s: float  # its forward and backward, without that wait and that for other replicas' gradients
    gather: GatherStatistics | None


class Trainer:
    """Owns the step; the loop around it, checkpoints and logs are `run.train`'s."""

    def __init__(
        self,
        config: RunConfig,
        ranks: Ranks,
        chunks: Sequence[nn.Module],
        optimizer: BackboneOptimizer,
        memory: ConditionalMemory | None,
    ) -> None:
        self.config = config
        self.ranks = ranks
        self.chunks = list(chunks)
        self.optimizer = optimizer
        self.memory = memory
        self.runner = ScheduleRunner(chunks, config)
        self.schedule = learning_rate_schedule(config.optimizer, config.training.num_steps)
        self.flops_per_token = token_flops(config).forward_backward
        self._reported_updates = 0 if memory is None else memory.optimizer.step_count
        self._ahead: tuple[int, StepRows] | None = None  # the step that the tables prepare for, and its rows

    def train_step(
        self,
        step: int,
        batches: Sequence[Batch],
        *,
        stop_requested: bool,
        next_batches: Sequence[Batch] | None = None,
    ) -> StepResult:
        """Update the model with `batches`, this rank's microbatches of step `step` (0-based).

        `next_batches`: those of step `step` + 1, for which the tables then prepare; on every rank or on none.

        Raises:
            NonFiniteLossError: on every rank alike, before the optimizer moves.
        """
        started = time.perf_counter()
        self.optimizer.zero_grad()
        rows = self._take_rows(step, batches)
        if self.memory is not None and next_batches is not None:
            self._ahead = (step + 1, self.memory.plan(next_batches))
        microbatches = self._prepare(batches, rows, is_training=True)
        sums = self.runner.train(microbatches, len(batches))
        compute_s = self.runner.gradients_ready - started - (0.0 if rows is None else rows.wait_s)
        counted = once_per_replica(
            [sums.loss, float(sums.tokens), sums.mtp_loss, float(sums.mtp_tokens)],
            self.ranks,
        )
        totals = sum_over_ranks([*counted, float(stop_requested)], self.ranks)
        num_tokens = max(int(totals[1]), 1)  # a batch of nothing but document starts has none
        loss, mtp_loss = totals[0] / num_tokens, totals[2] / max(int(totals[3]), 1)
        if not math.isfinite(loss + mtp_loss):
            prediction = f", that of multi-token prediction {mtp_loss}" if self.config.model.mtp.num_layers > 0 else ""
            raise NonFiniteLossError(f"loss is {loss}{prediction} in step {step + 1}; the optimizer has not moved")
        learning_rate = self.schedule.at(step)
        gradient_norm = self._update(step, rows, num_tokens, learning_rate)
        platform.synchronize()
        gather = None if rows is None or self.memory is None else self.memory.statistics(rows)
        return StepResult(
            loss=loss,
            mtp_loss=mtp_loss if self.config.model.mtp.num_layers > 0 else None,
            gradient_norm=gradient_norm,
            learning_rate=learning_rate,
            num_tokens=num_tokens,
            stop_requests=int(totals[4]),
            seconds=time.perf_counter() - started,
            gather_wait_s=0.0 if rows is None else rows.wait_s,
            compute_s=compute_s,
            gather=gather,
        )

    def validate(self, microbatches_of: Callable[[int], Sequence[Batch]], num_batches: int) -> float:
        """Mean loss in nats per token over global batches 0 to `num_batches - 1`, of which `microbatches_of` gives
        this rank's part. Collective."""
        loss_sum, tokens = 0.0, 0
        for index in range(num_batches):
            batches = microbatches_of(index)
            microbatches = self._prepare(batches, self._rows(batches), is_training=False)
            sums = self.runner.evaluate(microbatches, len(batches))
            loss_sum, tokens = loss_sum + sums.loss, tokens + sums.tokens
        counted = once_per_replica([loss_sum, float(tokens)], self.ranks)
        total_loss, total_tokens = sum_over_ranks(counted, self.ranks)
        return total_loss / max(total_tokens, 1.0)

    def metrics(self, result: StepResult, data_wait_s: float = 0.0) -> dict[str, float]:
        """TensorBoard tags and values of a step, before which this rank has waited `data_wait_s` for its batches.
        Collective: all ranks call it for the same steps."""
        # All tokens that were computed, also those at document ends whose loss does not count.
        rate = self.config.training.global_batch_size * self.config.data.sequence_length / result.seconds
        values = {
            "train/loss": result.loss,
            "train/grad_norm": result.gradient_norm,
            "train/learning_rate": result.learning_rate,
            "perf/tokens_per_second": rate,
            "perf/step_ms": result.seconds * 1e3,
        }
        values |= rank_metrics(result.compute_s, data_wait_s, self.ranks)
        peak = self.config.training.peak_tflops_per_rank * 1e12 * self.ranks.world_size
        if peak > 0:
            values["perf/mfu"] = rate * self.flops_per_token / peak
        if self.memory is not None and result.gather is not None:
            values["train/table_learning_rate"] = result.learning_rate * self.memory.learning_rate_multiplier
            values |= gather_metrics(result.gather, result.gather_wait_s, self.ranks)
            updates = self.memory.optimizer.step_count
            values |= table_metrics(self.memory, updates - self._reported_updates, self.ranks)
            self._reported_updates = updates
        if result.mtp_loss is not None:
            values["train/mtp_loss"] = result.mtp_loss
        return values | self._model_metrics()

    def _model_metrics(self) -> dict[str, float]:
        return layer_metrics(self.config, self.chunks, self.ranks) | expert_metrics(
            self.config, self.runner.expert_tokens, self.ranks
        )

    def _take_rows(self, step: int, batches: Sequence[Batch]) -> StepRows | None:
        """The rows of a step: those prepared in the step before, or fetched now."""
        ahead, self._ahead = self._ahead, None
        if ahead is None:
            return self._rows(batches)
        assert ahead[0] == step, f"prepared for step {ahead[0]}, not {step}"
        return ahead[1]

    def _rows(self, batches: Sequence[Batch]) -> StepRows | None:
        if self.memory is None:
            return None
        rows = self.memory.plan(batches)
        self.memory.fetch(rows)
        return rows

    def _prepare(
        self, batches: Sequence[Batch], rows: StepRows | None, *, is_training: bool
    ) -> list[Iterator[Microbatch]]:
        """The microbatches for each chunk; the rows of one are expanded only when a chunk's turn comes."""
        return [self._microbatches(batches, rows, chunk, is_training) for chunk in range(len(self.chunks))]

    def _microbatches(
        self, batches: Sequence[Batch], rows: StepRows | None, chunk: int, is_training: bool
    ) -> Iterator[Microbatch]:
        engram = self.config.engram
        for index, batch in enumerate(batches):
            memory_LTBE = None
            if self.memory is not None and rows is not None:
                memory_LTBE = self.memory.of_microbatch(rows, index, chunk)
            yield make_microbatch(
                batch,
                memory_LTBE,
                separate_documents=self.config.data.separate_documents,
                cut_memory_at_documents=engram is not None and engram.cut_at_documents,
                multi_token_prediction=is_training and self.config.model.mtp.num_layers > 0,
                positions=self.ranks.token_positions(batch.tokens.shape[1]),
            )

    def _update(self, step: int, rows: StepRows | None, num_tokens: int, learning_rate: float) -> float:
        """Clip and move everything; returns the norm before clipping."""
        row_gradients, table_square = None, 0.0
        if self.memory is not None and rows is not None:
            row_gradients = self.memory.return_gradients(rows)
            table_square = row_gradients.norm_squared  # of its own rows: over all ranks, each counts once
        self.optimizer.prepare_gradients()
        backbone_square = self.optimizer.gradient_norm_squared()
        square = backbone_square + sum_over_ranks([table_square], self.ranks)[0]
        norm = math.sqrt(square) / num_tokens if square >= 0 else math.nan
        if not math.isfinite(norm):
            raise NonFiniteLossError(f"gradient norm is {norm} in step {step + 1}; the optimizer has not moved")
        scale = clip_coefficient(norm, self.config.optimizer.clip_grad_norm) / num_tokens
        if self.memory is not None and row_gradients is not None:
            self.memory.step(row_gradients, learning_rate, scale)
            if self._ahead is not None:
                self.memory.fetch(self._ahead[1])
        self.optimizer.step(learning_rate, scale)
        return norm


def clip_coefficient(norm: float, max_norm: float) -> float:
    """What gradients of norm `norm` are multiplied by (torch's `clip_grad_norm_` rule); `max_norm` 0: never clip."""
    return min(1.0, max_norm / (norm + 1e-6)) if max_norm > 0 else 1.0
