"""The memory of a run: from token ids to rows in the model, and from gradients to updated rows.

A step in its tasks, which a thread of its own runs one after another (`tables.overlap`), and what of the model's work
each runs beside:

    plan       hash, distinct rows, ids to their owners        the step before
    fetch      the rows, wave by wave                          Muon; then the microbatches of earlier waves
    return     gradients to the owners                         -
    update     row Adam or balanced momentum                   Muon

Shape legend: N microbatches, B sequences, T positions, S = T / (context * tensor) positions of this rank's share,
L Engram layers of this pipeline rank's chunks (all but those of the docstrings that say "of the chunk"), H heads of a
layer, D row_dim, E = H * D memory width.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from engram_data.batch import Batch
from engram_kernels.catch_up import CatchUp
from engram_megatron import platform
from engram_megatron.config import RunConfig
from engram_megatron.gather.buffers import BufferPool
from engram_megatron.gather.groups import NodeGroups, make_groups, open_node_shards
from engram_megatron.gather.lookup import RowLookup
from engram_megatron.gather.statistics import GatherStatistics
from engram_megatron.gather.topology import find_topology
from engram_megatron.gather.transport import exercise_pairs
from engram_megatron.gather.unique_rows import UniqueRows
from engram_megatron.gather.worker import Worker
from engram_megatron.hashing.ngram_hasher import NgramHasher
from engram_megatron.model.backbone_config import TORCH_DTYPE
from engram_megatron.model.pipeline_layout import chunk_memory_layers, pipeline_layout
from engram_megatron.optimizer.row_adam import RowAdam
from engram_megatron.optimizer.row_optimizer import RowOptimizer
from engram_megatron.optimizer.row_sinkhorn import RowSinkhorn
from engram_megatron.tables.expected_rows import expected_touched_rows
from engram_megatron.tables.placement import placement_of
from engram_megatron.tables.row_gradients import RowGradients
from engram_megatron.tables.row_layout import RowLayout
from engram_megatron.tables.table_shard import TableShard
from engram_megatron.training.parallel import Ranks


class StepRows:
    """The rows of a step on their way. `wait_s`: seconds that the caller has waited for them so far."""

    def __init__(self, planned: Future[UniqueRows]) -> None:
        self._planned = planned
        self._fetched: list[Future[None]] = []
        self._arrived = 0
        self.wait_s = 0.0

    def wait(self, wave: int) -> UniqueRows:
        """The rows, those up to `wave` on the model's device. Raises what went wrong on the way."""
        started = time.perf_counter()
        rows = self._planned.result()
        while self._arrived <= wave:
            self._fetched[self._arrived].result()
            rows.to_device(self._arrived)
            self._arrived += 1
        self.wait_s += time.perf_counter() - started
        return rows

    def fetch(self, worker: Worker, lookup: RowLookup) -> None:
        """Ask for all waves, once their plan is made."""
        assert not self._fetched, "fetched already"
        self._fetched = [
            worker.submit("fetch", partial(self._fetch_wave, lookup, wave)) for wave in range(lookup.num_waves)
        ]

    def _fetch_wave(self, lookup: RowLookup, wave: int) -> None:
        lookup.fetch(self._planned.result(), wave)


class ConditionalMemory:
    """This rank's shard of the tables, and what fetches, differentiates and updates rows of all of them."""

    def __init__(
        self,
        config: RunConfig,
        hasher: NgramHasher,
        ranks: Ranks,
        *,
        shards_on_host: int = 1,
        on_failure: Callable[[BaseException], None] | None = None,
    ) -> None:
        """Collective over all ranks. Rows are left at zero: call `initialize` or load a checkpoint.

        `on_failure` is called with what went wrong in the tables' thread, as it does (see `Worker`).

        Raises:
            UsageError: the host's memory or disk does not hold its shards, nodes differ in size, or ranks of a node
                cannot open each other's memory.
            TransportError: other bytes arrive between two ranks than were sent.
        """
        assert config.engram is not None
        self.engram = config.engram
        self.tables = config.tables
        self.chunks = _chunk_layers(config, ranks.pipeline_rank)
        self.dtype = TORCH_DTYPE[config.training.dtype]
        self.hasher = hasher
        self.ranks = ranks
        topology = find_topology(ranks.host_group, self.tables.ranks_per_node)
        layout = RowLayout(hasher.total_rows, self.tables.block_rows, ranks.world_size, topology.num_nodes)
        self.shard = TableShard(
            layout,
            ranks.rank,
            config.engram.row_dim,
            self.tables.dtype,
            placement=placement_of(self.tables),
            moments=self.tables.moments,
            shards_on_host=shards_on_host,
            touched_rows=expected_touched_rows(config, layout),
        )
        # All ranks of a host have judged the same free memory when this returns.
        self.shards = open_node_shards(self.shard, topology, ranks.host_group)
        groups = make_groups(topology, config.parallel.collective_timeout_s, self.tables.transport)
        exercise_pairs(groups.node)
        exercise_pairs(groups.rail)
        self.num_waves = min(self.tables.waves, config.training.num_microbatches(ranks.data_ranks))
        first_rows = [*hasher.layer_offsets.tolist(), hasher.total_rows]
        self.optimizer = _row_optimizer(config, self.shard, first_rows, groups)
        self.lookup = RowLookup(self.shards, self.optimizer.read_as_of, groups, self.num_waves)
        self.learning_rate_multiplier = config.optimizer.table_learning_rate_multiplier
        self._ids = BufferPool()
        self.worker = Worker(beside=self.tables.overlap, on_failure=on_failure)

    def initialize(self, seed: int) -> None:
        """Fill the shard with its initial rows, a function of (seed, row id)."""
        self.shard.initialize(seed, self.engram.init_std)
        self.share_initial()

    def share_initial(self) -> None:
        """Let the other shards of the node make their rows as this one does, after it was initialized or loaded."""
        for shard in self.shards:
            shard.initial = self.shard.initial

    def plan(self, batches: Sequence[Batch]) -> StepRows:
        """Hash the microbatches of a step and tell the owners of their rows. Collective over all ranks.

        Tensor and context ranks hash whole sequences, because windows cross the borders of their shares, and ask for
        the rows of their own positions only: each position is asked for, and returns its gradient, once. Pipeline ranks
        ask for the layers that stand on them; one without any takes part as an owner of rows.
        """
        batches = list(batches)
        return StepRows(self.worker.submit("plan", lambda: self.lookup.plan(self._row_ids(batches))))

    def fetch(self, rows: StepRows) -> None:
        """Fetch what was planned, as the tables are after the updates asked for so far. Collective over all ranks."""
        rows.fetch(self.worker, self.lookup)

    def _row_ids(self, batches: Sequence[Batch]) -> NDArray[np.int64]:
        """Row ids int64 [N, L, B, S, H]."""
        layers = [layer for layers in self.chunks for layer in layers]
        B, T = batches[0].tokens.shape
        rows_NLBTH = self._ids.empty((len(batches), len(layers), B, T, self.engram.num_heads), np.int64)
        for rows_LBTH, batch in zip(rows_NLBTH, batches, strict=True):
            documents = batch.document_ids if self.engram.cut_at_documents else None
            self.hasher.rows(batch.tokens, documents, layers, out=rows_LBTH)
        positions = self.ranks.memory_positions(T)
        return rows_NLBTH if positions.size == T else rows_NLBTH[:, :, :, positions]

    def of_microbatch(self, rows: StepRows, index: int, chunk: int = 0) -> torch.Tensor | None:
        """Memory [L of the chunk, S, B, E] of microbatch `index`, in the model's dtype, differentiable back to the
        rows; None for a chunk without Engram layers. Waits for the microbatch's wave."""
        if not self.chunks[chunk]:
            return None
        first = sum(len(layers) for layers in self.chunks[:chunk])
        unique = rows.wait(min(index, self.num_waves - 1))
        memory_LBSHD = unique.expand((index, slice(first, first + len(self.chunks[chunk]))), self.dtype)
        return memory_LBSHD.transpose(1, 2).flatten(-2)

    def return_gradients(self, rows: StepRows) -> RowGradients:
        """Bring the gradients of a step to the rows' owners. Collective over all ranks."""
        unique = rows.wait(self.num_waves - 1)
        platform.synchronize()  # the backward's additions
        return self.worker.submit("return", lambda: self.lookup.return_gradients(unique)).result()

    def step(self, gradients: RowGradients, learning_rate: float, gradient_scale: float) -> None:
        """Move this rank's rows (`tables.update`) at the tables' multiple of `learning_rate`, without weight decay.
        Returns at once; every later fetch sees it. Collective over all ranks."""
        table_learning_rate = learning_rate * self.learning_rate_multiplier
        self.worker.submit("update", lambda: self.optimizer.step(gradients, table_learning_rate, gradient_scale))

    def finish(self) -> None:
        """Wait until all that was asked for is done, so that the shard may be read. Raises what went wrong."""
        self.worker.finish()

    def close(self) -> None:
        """End the thread, after what it is doing now."""
        self.worker.close()

    def statistics(self, rows: StepRows) -> GatherStatistics:
        """What the gather of a step moved on this rank."""
        return rows.wait(self.num_waves - 1).statistics


def _row_optimizer(config: RunConfig, shard: TableShard, first_rows: Sequence[int], groups: NodeGroups) -> RowOptimizer:
    optimizer = config.optimizer
    if config.tables.update == "sinkhorn":
        return RowSinkhorn(shard, first_rows, optimizer, groups.sum_over_ranks)
    catch_up = CatchUp(optimizer.adam_beta1, optimizer.adam_beta2, optimizer.adam_eps)
    return RowAdam(shard, catch_up, touched_only=config.tables.update == "touched")


def _chunk_layers(config: RunConfig, pipeline_rank: int) -> list[list[int]]:
    """For each chunk of a pipeline rank, which of the model's Engram layers (counted from 0) stand in it."""
    assert config.engram is not None
    layout, numbers = pipeline_layout(config), config.engram.layer_numbers
    return [
        [numbers.index(number) for number in chunk_memory_layers(config, layout.layers(pipeline_rank, chunk))]
        for chunk in range(layout.chunks_per_rank)
    ]
