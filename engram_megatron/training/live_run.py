"""A run on one rank: its parts, built and filled, and how it saves."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from engram_checkpoints.train_state import TrainState
from engram_data.skipped_samples import Windows, union
from engram_data.stream import TokenStream
from engram_megatron.config import RunConfig
from engram_megatron.model.backbone_config import TORCH_DTYPE
from engram_megatron.model.builder import build_model_chunks, wrap_data_parallel
from engram_megatron.optimizer.backbone import build_backbone_optimizer
from engram_megatron.training.checkpoint_writer import CheckpointWriter
from engram_megatron.training.checkpointing import Checkpointer, Progress
from engram_megatron.training.conditional_memory import ConditionalMemory
from engram_megatron.training.heartbeat import Heartbeat, Phase, remove_beats_of_others
from engram_megatron.training.loss_spike import LossWatch
from engram_megatron.training.metrics import MetricsLog
from engram_megatron.training.node_snapshots import NodeSnapshots
from engram_megatron.training.parallel import Ranks
from engram_megatron.training.preflight import Inputs, stream_of
from engram_megatron.training.run_folder import RunFolder
from engram_megatron.training.trainer import Trainer


@dataclass(eq=False)
class LiveRun:
    """What trains, on one rank, and how far it is. `log` exists on the first rank only."""

    config: RunConfig
    ranks: Ranks
    folder: RunFolder
    trainer: Trainer
    checkpointer: Checkpointer
    train: TokenStream
    validation: TokenStream
    heartbeat: Heartbeat
    log: MetricsLog | None
    step: int  # updates done
    tokens_seen: int
    skipped: Windows
    losses: LossWatch
    saved_step: int = -1
    snapshots: NodeSnapshots | None = None

    def say(self, line: str) -> None:
        if self.log is not None:
            self.log.say(line)

    def progress(self, phase: Phase) -> None:
        self.heartbeat.progress(self.step, phase)

    def save(self) -> None:
        """To the run folder. Collective, as all saves."""
        if self.saved_step != self.step:
            self.progress("saving")
            self.checkpointer.save(self._progress)
            self.saved_step = self.step
            self.progress("training")
            self.log_saved()

    def save_on_nodes(self) -> None:
        assert self.snapshots is not None, "the config was validated"
        self.progress("saving")
        self.checkpointer.save_to(self.snapshots.target(self.step), self._progress, may_be_delta=False)
        self.progress("training")
        self.log_saved()

    def finish_saving(self) -> None:
        """Wait for saves that are being written. Collective."""
        self.progress("saving")
        self.writer.finish()
        self.log_saved()

    def log_saved(self) -> None:
        """Not collective: ranks learn at their own time of a checkpoint that is complete."""
        for saved in self.writer.take_saved():
            if self.log is not None:
                tag = saved.target.metric
                values = {f"{tag}/seconds": saved.seconds, f"{tag}/stall_ms": saved.stall_s * 1e3}
                self.log.saved(saved.step, values, str(saved.target))
        for failure in self.writer.take_failures():
            self.say(f"warning: {failure}")

    @property
    def writer(self) -> CheckpointWriter:
        return self.checkpointer.writer

    @property
    def _progress(self) -> Progress:
        return Progress(
            step=self.step, tokens_seen=self.tokens_seen, skipped=self.skipped, recent_losses=self.losses.losses
        )


def build_run(
    config: RunConfig,
    ranks: Ranks,
    folder: RunFolder,
    inputs: Inputs,
    skipped: Windows,
    heartbeat: Heartbeat,
    on_table_failure: Callable[[BaseException], None] | None,
) -> LiveRun:
    """Build model, optimizer and tables, and fill them: of the checkpoint to continue from, of `init_from`, or anew.
    Collective. Nothing is written before that has been read.

    `skipped`: what the run leaves out by its folder's log; the checkpoint may know of more. `on_table_failure`: see
    `run.train`. Raises `UsageError` for a checkpoint that cannot be read.
    """
    memory = None
    if inputs.hasher is not None:
        memory = ConditionalMemory(
            config,
            inputs.hasher,
            ranks,
            shards_on_host=_ranks_on_this_host(ranks),
            on_failure=on_table_failure,
        )
    chunks = wrap_data_parallel(
        build_model_chunks(config),
        TORCH_DTYPE[config.training.dtype],
        distributed_optimizer=config.parallel.distributed_optimizer,
    )
    optimizer = build_backbone_optimizer(chunks, config)
    writer = CheckpointWriter(ranks, config.parallel.collective_timeout_s)
    checkpointer = Checkpointer(folder, config, ranks, chunks, optimizer, memory, inputs.train, writer)
    state = _restore(config, checkpointer, inputs)
    step, tokens_seen, losses = 0, 0, list[float]()
    if state is not None:
        step, tokens_seen, losses = state.step, state.tokens_seen, state.recent_losses
        skipped = union([*skipped, *state.skipped_samples])
    log = None
    if ranks.is_first:
        folder.claim(config)
        remove_beats_of_others(folder.path, ranks.world_size)
        log = MetricsLog(folder, first_step=step, num_steps=config.training.num_steps, output=sys.stdout)
        log.describe(config, ranks.world_size)
    return LiveRun(
        config=config,
        ranks=ranks,
        folder=folder,
        trainer=Trainer(config, ranks, chunks, optimizer, memory),
        checkpointer=checkpointer,
        train=stream_of(config, inputs.train, data_rank=ranks.data_rank, data_ranks=ranks.data_ranks, skipped=skipped),
        validation=stream_of(config, inputs.validation, data_rank=ranks.data_rank, data_ranks=ranks.data_ranks),
        heartbeat=heartbeat,
        log=log,
        step=step,
        tokens_seen=tokens_seen,
        skipped=skipped,
        losses=LossWatch(config.spikes, losses),
        saved_step=step if inputs.resume_from is not None else -1,
    )


def _restore(config: RunConfig, checkpointer: Checkpointer, inputs: Inputs) -> TrainState | None:
    """Fill weights and tables; returns what a checkpoint that the run continues from says."""
    if inputs.resume_from is not None:
        return checkpointer.load(inputs.resume_from)
    if config.checkpoint.init_from:
        checkpointer.load_weights(Path(config.checkpoint.init_from))
    elif checkpointer.memory is not None:
        checkpointer.memory.initialize(config.training.seed)
    return None


def _ranks_on_this_host(ranks: Ranks) -> int:
    hosts: list[str | None] = [None] * ranks.world_size
    dist.all_gather_object(hosts, socket.gethostname(), group=ranks.host_group)
    return hosts.count(socket.gethostname())
