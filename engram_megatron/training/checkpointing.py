"""Saving and loading a run: the backbone, the tables, and the state of training.

    step_00000100/
      backbone/          megatron-core distributed checkpoint: weights, optimizer state, router biases
      tables.zarr/       rows and their Adam moments (absent without Engram)
      train_state.json   step, tokens seen, skipped samples, corpus fingerprint, hash identity, the full config
      manifest.json      size and CRC-32C of every file
      COMPLETE           written last; a folder without it does not exist for a resume

The data order is a pure function of the step and of what is skipped, and the model has no dropout, so nothing else is
state.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch.distributed as dist
from torch import nn

from engram_checkpoints.backbone import BackboneSnapshot, load_backbone, load_backbone_weights
from engram_checkpoints.checkpoint_files import damages, read_manifest
from engram_checkpoints.deltas import is_worthwhile, next_base
from engram_checkpoints.table_format import Base, is_table_chunk
from engram_checkpoints.table_snapshot import TableSnapshot
from engram_checkpoints.tables import load_shard
from engram_checkpoints.train_state import TrainState
from engram_data.corpus import Corpus
from engram_data.skipped_samples import Windows
from engram_megatron.config import RunConfig
from engram_megatron.errors import UsageError
from engram_megatron.optimizer.backbone import BackboneOptimizer
from engram_megatron.overrides import to_dict
from engram_megatron.training.checkpoint_writer import BACKBONE, TABLES, CheckpointWriter, Snapshot
from engram_megatron.training.conditional_memory import ConditionalMemory
from engram_megatron.training.parallel import Ranks, sum_over_ranks
from engram_megatron.training.run_folder import RunFolder
from engram_megatron.training.save_target import RunCheckpoint, SaveTarget
from engram_megatron.training.train_state import advice_on_damage


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run is, beside its weights and tables. `skipped`: what it leaves out, before and after this step."""

    step: int  # updates done
    tokens_seen: int
    skipped: Windows
    recent_losses: Sequence[float]  # for `LossWatch`


@dataclass(frozen=True, eq=False)
class Checkpointer:
    """Saves and loads one run. Every method is collective over all ranks."""

    folder: RunFolder
    config: RunConfig
    ranks: Ranks
    chunks: Sequence[nn.Module]
    optimizer: BackboneOptimizer
    memory: ConditionalMemory | None
    corpus: Corpus
    writer: CheckpointWriter

    def save(self, progress: Progress) -> None:
        """`save_to` the run's folder, all of it or what has changed since an earlier one."""
        path = self.folder.checkpoint(progress.step)
        target = RunCheckpoint(path, self.ranks, lambda: self.folder.remove_old_checkpoints(self.config.checkpoint))
        self.save_to(target, progress, may_be_delta=True)

    def save_to(self, target: SaveTarget, progress: Progress, *, may_be_delta: bool) -> None:
        """Write the checkpoint of `progress` as everything stands now, while training goes on, or without
        `checkpoint.asynchronous` wait for it. A checkpoint in flight is waited for first.

        Raises:
            SaveError: the file system refused (a full disk, a quota), that one or, when waiting, this one, and the
                target may not fail; on all ranks.
        """
        started = time.perf_counter()
        self.writer.finish()
        memory = self.memory
        if memory is not None:
            memory.finish()
        snapshot = Snapshot(
            started=started,
            target=target,
            state=self._state(progress),
            backbone=BackboneSnapshot(self.chunks, self.optimizer),
            tables=None if memory is None else self._table_snapshot(memory, may_be_delta),
        )
        self.writer.write(snapshot, wait=not self.config.checkpoint.asynchronous)

    def _table_snapshot(self, memory: ConditionalMemory, may_be_delta: bool) -> TableSnapshot:
        optimizer, options = memory.optimizer, self.config.checkpoint
        base: Base | None = None
        # Balanced momentum moves every row in every step, without a trace in its last step.
        if may_be_delta and optimizer.rule != "sinkhorn":
            found: list[Base | None] = [None]
            if self.ranks.is_first:
                complete = self.folder.complete_checkpoints()
                found = [next_base(complete, options.deltas_between_full, optimizer.step_count)]
            dist.broadcast_object_list(found, src=0, group=self.ranks.host_group)
            (base,) = found
        if base is not None:
            changed = np.count_nonzero(memory.shard.last_step > base.step_count)
            total = sum_over_ranks([float(changed), float(memory.shard.touched_rows)], self.ranks)
            base = base if is_worthwhile(*total) else None
        return TableSnapshot(optimizer, options.staging_bytes, base)

    def load(self, path: Path) -> TrainState:
        """Continue from `path`, bit for bit (`preflight` has compared configs and hash identities).

        Raises:
            UsageError: a tensor or chunk is missing, damaged or of another shape.
        """
        with advice_on_damage():
            state = TrainState.read(path)
            self._check_files(path)
            load_backbone(path / BACKBONE, self.chunks, self.optimizer)
            self._load_tables(path, weights_only=False)
        return state

    def load_weights(self, path: Path) -> None:
        """Take weights and table rows of `path`; the optimizer, the step and the data start anew."""
        self._check_files(path)
        load_backbone_weights(path / BACKBONE, self.chunks, self.optimizer)
        self._load_tables(path, weights_only=True)

    def _check_files(self, path: Path) -> None:
        """Compare the files with the manifest, each read by one rank, but for the chunks of the tables, which carry
        sums of their own."""
        files = [(name, wanted) for name, wanted in read_manifest(path).items() if not is_table_chunk(name)]
        share = files[self.ranks.rank :: self.ranks.world_size]
        problem = next(damages(path, share), None)
        self._raise_first(None if problem is None else f"{problem}; use another checkpoint")

    def _load_tables(self, path: Path, *, weights_only: bool) -> None:
        """Each rank reads its own rows; a chunk that one of them cannot read stops all."""
        problem = None
        if self.memory is not None:
            try:
                load_shard(path / TABLES, self.memory.optimizer, weights_only=weights_only)
                self.memory.share_initial()
            except UsageError as error:
                problem = str(error)
        self._raise_first(problem)

    def _raise_first(self, problem: str | None) -> None:
        """Raise the problem of the lowest rank that has one, on all ranks."""
        problems: list[str | None] = [None] * self.ranks.world_size
        dist.all_gather_object(problems, problem, group=self.ranks.host_group)
        for found in problems:
            if found is not None:
                raise UsageError(found)

    def _state(self, progress: Progress) -> TrainState:
        return TrainState(
            step=progress.step,
            tokens_seen=progress.tokens_seen,
            world_size=self.ranks.world_size,
            corpus_fingerprint=self.corpus.fingerprint,
            tokenizer_sha256=self.corpus.tokenizer.sha256,
            hash_identity=None if self.memory is None else self.memory.hasher.identity(),
            config=to_dict(self.config),
            skipped_samples=[list(window) for window in progress.skipped],
            recent_losses=list(progress.recent_losses),
        )
