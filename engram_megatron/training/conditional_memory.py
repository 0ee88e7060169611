"""The memory of a run: from token ids to rows in the model, and from gradients to updated rows.

Shape legend: N microbatches, B sequences, T positions, S = T / (context * tensor) positions of this rank's share,
L Engram layers of this pipeline rank's chunks (all but those of the docstrings that say "of the chunk"), H heads of a
layer, D row_dim, E = H * D memory width.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from engram_data.batch import Batch
from engram_megatron.config import RunConfig
from engram_megatron.gather.lookup import PendingRows, RowLookup, UniqueRows
from engram_megatron.gather.transport import all_ranks_transport
from engram_megatron.hashing.ngram_hasher import NgramHasher
from engram_megatron.model.backbone_config import TORCH_DTYPE
from engram_megatron.model.pipeline_layout import chunk_memory_layers, pipeline_layout
from engram_megatron.optimizer.row_adam import RowAdam
from engram_megatron.tables.row_gradients import RowGradients
from engram_megatron.tables.row_layout import RowLayout
from engram_megatron.tables.table_shard import TableShard
from engram_megatron.training.parallel import Ranks


class ConditionalMemory:
    """This rank's shard of the tables, and what fetches, differentiates and updates rows of all of them."""

    def __init__(self, config: RunConfig, hasher: NgramHasher, ranks: Ranks, *, shards_on_host: int = 1) -> None:
        """Collective over all ranks. Rows are left at zero: call `initialize` or load a checkpoint.

        Raises:
            UsageError: the host's memory does not hold its shards.
        """
        assert config.engram is not None
        self.engram = config.engram
        self.chunks = _chunk_layers(config, ranks.pipeline_rank)
        self.dtype = TORCH_DTYPE[config.training.dtype]
        self.hasher = hasher
        self.ranks = ranks
        layout = RowLayout(hasher.total_rows, config.engram.block_rows, ranks.world_size)
        row_dim, dtype = config.engram.row_dim, config.engram.table_dtype
        self.shard = TableShard(layout, ranks.rank, row_dim, dtype, shards_on_host=shards_on_host)
        dist.barrier(group=ranks.host_group)  # every rank of a host judged the same free memory
        self.lookup = RowLookup(self.shard, layout, all_ranks_transport(timeout_s=config.parallel.collective_timeout_s))
        optimizer = config.optimizer
        self.adam = RowAdam(self.shard, beta1=optimizer.adam_beta1, beta2=optimizer.adam_beta2, eps=optimizer.adam_eps)
        self.learning_rate_multiplier = optimizer.table_learning_rate_multiplier

    def initialize(self, seed: int) -> None:
        """Fill the shard with its initial rows, a function of (seed, row id)."""
        self.shard.initialize(seed, self.engram.init_std)

    def start(self, batches: Sequence[Batch]) -> PendingRows:
        """Hash the microbatches of a step and begin to fetch their distinct rows. Collective over all ranks.

        Tensor and context ranks hash whole sequences, because windows cross the borders of their shares, and ask for
        the rows of their own positions only: each position is asked for, and returns its gradient, once. Pipeline ranks
        ask for the layers that stand on them; one without any takes part as an owner of rows.
        """
        return self.lookup.start(np.stack([self._row_ids(batch) for batch in batches]))

    def _row_ids(self, batch: Batch) -> NDArray[np.int64]:
        """Row ids int64 [L, B, S, H]."""
        documents = batch.document_ids if self.engram.cut_at_documents else None
        rows_LBTH = self.hasher.rows(batch.tokens, documents, [layer for layers in self.chunks for layer in layers])
        return rows_LBTH[:, :, self.ranks.memory_positions(rows_LBTH.shape[2])]

    def of_microbatch(self, rows: UniqueRows, index: int, chunk: int = 0) -> torch.Tensor | None:
        """Memory [L of the chunk, S, B, E] of microbatch `index`, in the model's dtype, differentiable back to the
        rows; None for a chunk without Engram layers."""
        if not self.chunks[chunk]:
            return None
        first = sum(len(layers) for layers in self.chunks[:chunk])
        memory_LBSHD = rows.expand((index, slice(first, first + len(self.chunks[chunk]))))
        return memory_LBSHD.transpose(1, 2).flatten(-2).to(self.dtype)

    def return_gradients(self, rows: UniqueRows) -> RowGradients:
        """Bring the gradients of a step to the rows' owners. Collective over all ranks."""
        return self.lookup.return_gradients(rows)

    def gradient_norm_squared(self, gradients: RowGradients) -> float:
        """Of this rank's own rows: summed over all ranks, every table gradient counts once."""
        return self.adam.gradient_norm_squared(gradients)

    def step(self, gradients: RowGradients, learning_rate: float, gradient_scale: float) -> None:
        """Dense Adam over this rank's rows at the tables' multiple of `learning_rate`, without weight decay."""
        self.adam.step(gradients, learning_rate * self.learning_rate_multiplier, gradient_scale)


def _chunk_layers(config: RunConfig, pipeline_rank: int) -> list[list[int]]:
    """For each chunk of a pipeline rank, which of the model's Engram layers (counted from 0) stand in it."""
    assert config.engram is not None
    layout, numbers = pipeline_layout(config), config.engram.layer_numbers
    return [
        [numbers.index(number) for number in chunk_memory_layers(config, layout.layers(pipeline_rank, chunk))]
        for chunk in range(layout.chunks_per_rank)
    ]
