"""Tables that no machine at hand could hold, opened lazily and trained for some steps on the tiny backbone.

Shows that the size of a table is not what a step costs, and what stays resident: the pages of the rows that were
updated. It shows nothing about a table that has been trained for long, whose pages are all taken.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from engram_data.batch import Batch, make_batch
from engram_megatron.config import RunConfig
from engram_megatron.hashing.ngram_hasher import NgramHasher
from engram_megatron.hashing.vocab_projection import identity_projection
from engram_megatron.overrides import apply_overrides
from engram_megatron.presets import engram_tiny

RANKS, STEPS, SEQUENCES, LENGTH = 4, 20, 8, 64
# rows per head, width of a layer's memory: 231.7M rows of 80 (engram_40b), 768M rows of 256
GEOMETRIES = {"18.5B parameters (engram_40b)": (7_239_680, 1280), "196B parameters": (24_000_000, 4096)}


@dataclass(frozen=True)
class HugeRun:
    """What one rank saw. Bytes are those resident now: of its shard, and of the process without shared pages."""

    total_rows: int
    open_s: float
    step_s: float
    losses: tuple[float, float]
    shard_bytes: int
    process_bytes: int


def huge_config(rows_per_head: int, memory_dim: int) -> RunConfig:
    """engram_tiny with tables of a large model, bfloat16 with exact remainders, lazy."""
    return apply_overrides(
        engram_tiny(),
        [
            f"engram.rows_per_head={rows_per_head}",
            f"engram.memory_dim={memory_dim}",
            "engram.num_heads_per_order=8",
            "tables.commit=lazy",
            "tables.dtype=bfloat16",
            f"data.sequence_length={LENGTH}",
            f"training.global_batch_size={SEQUENCES}",
            "training.micro_batch_size=1",
            f"training.num_steps={STEPS}",
            "optimizer.warmup_steps=2",
        ],
    )


def train_huge(rank: int, world_size: int, rows_per_head: int, memory_dim: int) -> HugeRun:
    """On each of `RANKS` forked ranks."""
    import psutil

    from engram_megatron.layouts.rank_run import fresh_groups
    from engram_megatron.model.backbone_config import TORCH_DTYPE
    from engram_megatron.model.builder import build_model_chunks, wrap_data_parallel
    from engram_megatron.optimizer.backbone import build_backbone_optimizer
    from engram_megatron.training.conditional_memory import ConditionalMemory
    from engram_megatron.training.trainer import Trainer

    config = huge_config(rows_per_head, memory_dim)
    assert config.engram is not None
    ranks = fresh_groups(config, rank, world_size)
    vocabulary = config.model.vocab_size
    hasher = NgramHasher.from_config(config.engram, identity_projection(vocabulary), vocabulary)
    started = time.perf_counter()
    memory = ConditionalMemory(config, hasher, ranks, shards_on_host=world_size)
    memory.initialize(config.training.seed)
    opened = time.perf_counter()
    chunks = wrap_data_parallel(build_model_chunks(config), TORCH_DTYPE[config.training.dtype])
    trainer = Trainer(config, ranks, chunks, build_backbone_optimizer(chunks, config), memory)
    losses, seconds = [], []
    for step in range(STEPS):
        mine, upcoming = (_share(number, config, rank, world_size) for number in (step, step + 1))
        result = trainer.train_step(
            step, mine, stop_requested=False, next_batches=upcoming if step + 1 < STEPS else None
        )
        losses.append(result.loss)
        seconds.append(result.seconds)
    memory.finish()
    memory.close()
    usage = psutil.Process().memory_full_info()
    return HugeRun(
        total_rows=hasher.total_rows,
        open_s=opened - started,
        step_s=float(np.median(seconds)),
        losses=(losses[0], losses[-1]),
        shard_bytes=memory.shard.memory.resident_bytes(),
        process_bytes=int(usage.uss),
    )


def _share(step: int, config: RunConfig, rank: int, world_size: int) -> list[Batch]:
    """A rank's sequences of a step, one per microbatch: tokens drawn as frequent words are."""
    rng = np.random.default_rng(step)
    windows = np.minimum(rng.zipf(1.2, (SEQUENCES, LENGTH + 1)), config.model.vocab_size) - 1
    nowhere = np.empty(0, np.int64)
    return [make_batch([windows[s]], [nowhere], True) for s in range(rank, SEQUENCES, world_size)]


def lines(run: Callable[..., list[HugeRun]]) -> Iterator[str]:
    """The runs as text; `run` is `layouts.forked_ranks.run_ranks`."""
    for name, geometry in GEOMETRIES.items():
        of_ranks = run(train_huge, RANKS, *geometry, timeout_s=900.0)
        one = of_ranks[0]
        shards, processes = sum(r.shard_bytes for r in of_ranks), sum(r.process_bytes for r in of_ranks)
        opened = max(r.open_s for r in of_ranks)
        yield (
            f"{name}: {one.total_rows} rows on {RANKS} ranks opened in {opened:.1f} s; {STEPS} steps of "
            f"{one.step_s:.2f} s, loss {one.losses[0]:.3f} -> {one.losses[1]:.3f}; resident "
            f"{shards / 2**30:.2f} GiB of tables and {processes / 2**30:.2f} GiB of processes"
        )
