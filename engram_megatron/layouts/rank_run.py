"""What one rank of a layout does: build the small model, train a few steps, hand over all that must be equal."""

from __future__ import annotations

import numpy as np
import torch
from megatron.core import parallel_state
from torch import Tensor, nn

from engram_megatron import platform
from engram_megatron.config import RunConfig
from engram_megatron.layouts.records import Array, Plan, RankRecord, Rows, Shard, State, StepChoices, StepRecord
from engram_megatron.layouts.routing_replay import ChoiceRecorder, ChoiceReplay
from engram_megatron.layouts.small_model import global_batch, hasher_of, microbatches
from engram_megatron.layouts.weights import jitter_weights, roughen
from engram_megatron.model.backbone_config import TORCH_DTYPE
from engram_megatron.model.builder import build_model_chunks, wrap_data_parallel
from engram_megatron.model.layout_rules import check_layout
from engram_megatron.model.parameter_names import global_named_buffers, global_named_parameters
from engram_megatron.model.tensor_shard import partition_dim
from engram_megatron.optimizer.backbone import BackboneOptimizer, build_backbone_optimizer
from engram_megatron.tables.row_gradients import RowGradients
from engram_megatron.training import parallel
from engram_megatron.training.conditional_memory import ConditionalMemory
from engram_megatron.training.parallel import Ranks
from engram_megatron.training.trainer import Trainer

NO_ROWS = Rows(np.empty(0, np.int64), np.empty((0, 0)))
NO_STATE = State({}, NO_ROWS, {})


class SmallRun:
    """What `training.run` holds on a rank, for the small model. Collective; one per process at a time."""

    def __init__(self, config: RunConfig, rank: int, world_size: int) -> None:
        check_layout(config, world_size)
        self.config = config
        self.ranks = fresh_groups(config, rank, world_size)
        self.memory = None
        if config.engram is not None:
            self.memory = ConditionalMemory(config, hasher_of(config), self.ranks)
            self.memory.initialize(config.training.seed)
        chunks = build_model_chunks(config)
        roughen(chunks)
        self.chunks: list[nn.Module] = wrap_data_parallel(
            chunks,
            TORCH_DTYPE[config.training.dtype],
            distributed_optimizer=config.parallel.distributed_optimizer,
        )
        self.optimizer: BackboneOptimizer = build_backbone_optimizer(self.chunks, config)
        self.trainer = Trainer(config, self.ranks, self.chunks, self.optimizer, self.memory)

    def state(self) -> State:
        """A copy of this rank's part, under global names."""
        return State(
            parameters={name: self._shard(p, p) for name, p in global_named_parameters(self.chunks)},
            table=self._table(),
            expert_bias={n: _numbers(b) for n, b in global_named_buffers(self.chunks) if n.endswith("expert_bias")},
        )

    def _table(self) -> Rows:
        if self.memory is None:
            return NO_ROWS
        layout, shard = self.memory.lookup.layout, self.memory.shard
        self.memory.finish()
        rows = layout.global_row(self.ranks.rank, np.arange(shard.num_rows))
        return Rows(rows, shard.finished(self.memory.optimizer.read_as_of))

    def gradients(self, scale: float) -> dict[str, Shard]:
        """The reduced gradients by global name, times `scale`, copied. Collective."""
        whole = self.optimizer.whole_gradients()
        return {name: self._shard(p, whole[p] * scale) for name, p in global_named_parameters(self.chunks)}

    def _shard(self, parameter: nn.Parameter, values: Tensor) -> Shard:
        return Shard(_numbers(values), partition_dim(parameter), self.ranks.tensor_rank)


def train_small_model(rank: int, world_size: int, config: RunConfig, plan: Plan) -> RankRecord:
    """Train `plan.num_steps` steps of `config` on this rank of a layout; the default process group exists."""
    run = SmallRun(config, rank, world_size)
    if plan.jitter:
        jitter_weights(run.chunks, plan.jitter)
    start = run.state()
    steps, choices = train_steps(run, plan, first=0)
    return RankRecord(start, steps, run.state(), choices)


def train_steps(run: SmallRun, plan: Plan, first: int) -> tuple[list[StepRecord], list[StepChoices]]:
    """Steps `first` .. `plan.num_steps` - 1 of a run that has done those before; at most one call for a `SmallRun`."""
    config, ranks = run.config, run.ranks
    recorder = _Recorder(run)
    listener = ChoiceRecorder(run.chunks) if plan.record_choices else None
    replay = ChoiceReplay(run.chunks, config, ranks) if plan.choices is not None else None
    steps, choices = [], []
    for step in range(first, plan.num_steps):
        if replay is not None and plan.choices is not None:
            replay.start_step(plan.choices[step])
        batch = global_batch(step, config)
        mine = microbatches(batch, config.training.micro_batch_size, ranks.data_rank, ranks.data_ranks)
        result = run.trainer.train_step(step, mine, stop_requested=False)
        if listener is not None:
            choices.append(listener.take_step())
        recorded = step < plan.recorded_steps
        steps.append(
            StepRecord(
                loss=result.loss,
                gradient_norm=result.gradient_norm,
                num_tokens=result.num_tokens,
                tokens_per_expert={n: _numbers(t) for n, t in run.trainer.runner.expert_tokens.items()},
                gradients=recorder.gradients if recorded else {},
                table_gradients=recorder.rows if recorded else NO_ROWS,
                after=run.state() if recorded else NO_STATE,
            )
        )
    return steps, choices


class _Recorder:
    """Listens at the two optimizers: there gradients are whole and summed, and their scale is known."""

    def __init__(self, run: SmallRun) -> None:
        self.gradients: dict[str, Shard] = {}
        self.rows = NO_ROWS
        backbone_step = run.optimizer.step

        def record_backbone(lr: float, gradient_scale: float = 1.0) -> None:
            self.gradients = run.gradients(gradient_scale)
            backbone_step(lr, gradient_scale)

        run.optimizer.step = record_backbone  # type: ignore[method-assign]
        if run.memory is not None:
            self._record_rows(run.memory, run.ranks.rank)

    def _record_rows(self, memory: ConditionalMemory, rank: int) -> None:
        step, layout = memory.step, memory.lookup.layout

        def record(gradients: RowGradients, learning_rate: float, gradient_scale: float) -> None:
            ids = layout.global_row(rank, gradients.local_rows)
            self.rows = Rows(ids, gradients.gradients * gradient_scale)
            step(gradients, learning_rate, gradient_scale)

        memory.step = record  # type: ignore[method-assign]


def fresh_groups(config: RunConfig, rank: int, world_size: int) -> Ranks:
    """Process groups, on one thread per rank; those of an earlier run of this process are replaced."""
    platform.limit_threads(1)
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    return parallel.initialize_groups(config, rank, world_size)


def _numbers(tensor: Tensor) -> Array:
    """A copy in numpy; bfloat16, which numpy lacks, as float32."""
    tensor = tensor.detach().cpu()
    copy: Array = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy().copy()
    return copy
