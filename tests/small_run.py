"""A whole run small enough for a test: config, batches, and the objects that `training.run` would build on a rank.

Two layers of experts behind a dense one, four residual streams, Engram at layers 2 and 3, several documents per
sequence. The global batch of a step is the same for any number of ranks; each data replica takes two microbatches of
it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from engram_data.batch import Batch
from engram_megatron.config import RunConfig
from engram_megatron.layouts import small_model
from engram_megatron.layouts.small_model import small_model_config, take

VOCAB, LENGTH, GLOBAL_BATCH, MICROBATCHES = 200, 24, 8, 2


def small_run_config(dtype: Literal["float32", "float64"] = "float64", overrides: Sequence[str] = ()) -> RunConfig:
    """Every number in `dtype`; `overrides` are those of the command line."""
    sizes = [
        "model.num_layers=3",
        f"model.vocab_size={VOCAB}",
        "model.attention.num_heads=2",
        f"data.sequence_length={LENGTH}",
        f"training.global_batch_size={GLOBAL_BATCH}",
    ]
    return small_model_config(dtype, [*sizes, *overrides])


def global_batch(step: int, *, separate_documents: bool = True) -> Batch:
    """The `GLOBAL_BATCH` sequences of a step: sequence s has s + 1 documents, so that ranks count different tokens, and
    all draw from a few frequent tokens, so that they ask for the same rows."""
    separate = str(separate_documents).lower()
    return small_model.global_batch(step, small_run_config(overrides=[f"data.separate_documents={separate}"]))


def microbatches(batch: Batch, data_rank: int, data_ranks: int) -> list[Batch]:
    """The `MICROBATCHES` consecutive pieces of a global batch that data replica `data_rank` of `data_ranks` takes."""
    size = GLOBAL_BATCH // data_ranks // MICROBATCHES
    first = data_rank * MICROBATCHES
    return [take(batch, slice(i * size, (i + 1) * size)) for i in range(first, first + MICROBATCHES)]


@dataclass(eq=False)
class SmallRun:
    """What `training.run` holds on a rank. `chunks` are wrapped in DDP; `memory` None: without Engram."""

    config: RunConfig
    ranks: Any
    chunks: Any
    optimizer: Any
    memory: Any
    trainer: Any


def build_small_run(config: RunConfig, rank: int, world_size: int, *, rough: bool = True) -> SmallRun:
    """Inside a rank function, once per process. `rough`: see `layouts.weights.roughen`."""
    from engram_megatron.layouts.weights import roughen
    from engram_megatron.model.backbone_config import TORCH_DTYPE
    from engram_megatron.model.builder import build_model_chunks, wrap_data_parallel
    from engram_megatron.optimizer.backbone import build_backbone_optimizer
    from engram_megatron.training.conditional_memory import ConditionalMemory
    from engram_megatron.training.trainer import Trainer

    size = GLOBAL_BATCH // config.parallel.data(world_size) // MICROBATCHES
    config = replace(config, training=replace(config.training, micro_batch_size=size))
    ranks = small_groups(config, rank, world_size)
    memory = None
    if config.engram is not None:
        memory = ConditionalMemory(config, small_hasher(config), ranks)
        memory.initialize(config.training.seed)
    chunks = build_model_chunks(config)
    if rough:
        roughen(chunks)
    distributed = config.parallel.distributed_optimizer
    wrapped = wrap_data_parallel(chunks, TORCH_DTYPE[config.training.dtype], distributed_optimizer=distributed)
    optimizer = build_backbone_optimizer(wrapped, config)
    return SmallRun(config, ranks, wrapped, optimizer, memory, Trainer(config, ranks, wrapped, optimizer, memory))


def small_groups(config: RunConfig, rank: int, world_size: int) -> Any:
    """`rank_run.fresh_groups`, imported on the rank."""
    from engram_megatron.layouts.rank_run import fresh_groups

    return fresh_groups(config, rank, world_size)


def small_hasher(config: RunConfig) -> Any:
    """The n-gram hasher without compression: the vocabulary here has no texts."""
    return small_model.hasher_of(config)


def finished_table(memory: Any) -> np.ndarray[Any, Any]:
    """This rank's rows as the updates so far have left them."""
    memory.finish()
    table: np.ndarray[Any, Any] = memory.shard.finished(memory.optimizer.read_as_of)
    return table


def numbers(tensor: Any) -> np.ndarray[Any, Any]:
    """A copy in numpy."""
    copy: np.ndarray[Any, Any] = tensor.detach().cpu().numpy().copy()
    return copy
