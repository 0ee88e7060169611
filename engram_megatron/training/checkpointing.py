"""Saving and loading a run: the backbone, the tables, and the state of training.

    step_00000100/
      backbone/          megatron-core distributed checkpoint: weights, optimizer state, router biases
      tables.zarr/       rows and their Adam moments (absent without Engram)
      train_state.json   step, tokens seen, corpus fingerprint, hash identity, the full config
      manifest.json      size and CRC-32C of every file
      COMPLETE           written last; a folder without it does not exist for a resume

The data order is a pure function of the step and the model has no dropout, so nothing else is state.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from engram_checkpoints.backbone import load_backbone, load_backbone_weights, save_backbone
from engram_checkpoints.checkpoint_files import COMPLETE, FileSum, FileSums, complete, damages, read_manifest
from engram_checkpoints.table_format import TableDescription, create, is_table_chunk
from engram_checkpoints.table_writer import TableWriter
from engram_checkpoints.tables import load_shard, write_shard
from engram_checkpoints.train_state import TrainState
from engram_data.corpus import Corpus
from engram_megatron.config import RunConfig
from engram_megatron.errors import UsageError
from engram_megatron.optimizer.backbone import BackboneOptimizer
from engram_megatron.overrides import to_dict
from engram_megatron.training.conditional_memory import ConditionalMemory
from engram_megatron.training.parallel import Ranks
from engram_megatron.training.run_folder import RunFolder

BACKBONE, TABLES = "backbone", "tables.zarr"


class SaveError(RuntimeError):
    """A checkpoint could not be written; the last complete one stands."""


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

    def save(self, step: int, tokens_seen: int) -> Path:
        """Write the checkpoint of `step`; nothing counts before COMPLETE stands in it.

        The tables are at rest for as long: no update of theirs is under way.

        Raises:
            SaveError: the file system refused (a full disk, a quota); on the ranks that met it.
        """
        path = self.folder.checkpoint(step)
        if self.memory is not None:
            self.memory.finish()
        try:
            self._write(path, step, tokens_seen)
        except (OSError, CheckpointException) as error:  # torch wraps its writers' errors
            reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
            free_gib = shutil.disk_usage(self.folder.path).free / 1024**3
            raise SaveError(
                f"checkpoint {path} could not be written ({reason}); {free_gib:.2f} GiB are free there; make room and "
                "continue from the last complete one with --resume"
            ) from error
        return path

    def _write(self, path: Path, step: int, tokens_seen: int) -> None:
        sums = FileSums(path)
        if self.ranks.is_first:
            if path.exists():  # what a killed run left half-written
                (path / COMPLETE).unlink(missing_ok=True)
                shutil.rmtree(path)
            path.mkdir(parents=True)
        self._barrier()
        save_backbone(path / BACKBONE, self.chunks, self.optimizer, sums)
        if self.memory is not None:
            self._write_tables(path / TABLES, self.memory, sums)
        if self.ranks.is_first:
            self._state(step, tokens_seen).write(path, sums)
        of_ranks: list[dict[str, FileSum]] = [{}] * self.ranks.world_size
        # What COMPLETE vouches for must be on disk before it is.
        dist.all_gather_object(of_ranks, sums.flush(), group=self.ranks.host_group)
        if self.ranks.is_first:
            complete(path, {name: file_sum for of_rank in of_ranks for name, file_sum in of_rank.items()})
            self.folder.remove_old_checkpoints(self.config.checkpoint.keep_last)
        self._barrier()

    def _write_tables(self, path: Path, memory: ConditionalMemory, sums: FileSums) -> None:
        description = TableDescription.of(memory.optimizer)
        if self.ranks.is_first:
            create(path, description, memory.optimizer.learning_rates, sums)
        self._barrier()
        with TableWriter(path, description, sums) as writer:
            write_shard(writer, memory.shard)

    def load(self, path: Path) -> TrainState:
        """Continue from `path`, bit for bit (`preflight` has compared configs and hash identities).

        Raises:
            UsageError: a tensor or chunk is missing, damaged or of another shape.
        """
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

    def _state(self, step: int, tokens_seen: int) -> TrainState:
        return TrainState(
            step=step,
            tokens_seen=tokens_seen,
            world_size=self.ranks.world_size,
            corpus_fingerprint=self.corpus.fingerprint,
            tokenizer_sha256=self.corpus.tokenizer.sha256,
            hash_identity=None if self.memory is None else self.memory.hasher.identity(),
            config=to_dict(self.config),
        )

    def _barrier(self) -> None:
        dist.barrier(group=self.ranks.host_group)
