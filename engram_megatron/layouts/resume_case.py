"""What the ranks of a pair of layouts run: train and save under one, load under the other: see `resume_judge`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

from engram_checkpoints.backbone import load_backbone, save_backbone
from engram_checkpoints.checkpoint_files import FileSums
from engram_checkpoints.table_snapshot import TableSnapshot
from engram_checkpoints.table_writer import TableWriter
from engram_checkpoints.tables import load_shard
from engram_megatron.config import RunConfig
from engram_megatron.layouts.checkpoint_contents import BACKBONE, TABLES
from engram_megatron.layouts.judge import FLOAT32_DRAWS
from engram_megatron.layouts.rank_run import SmallRun, train_small_model, train_steps
from engram_megatron.layouts.records import Plan, RankRecord, StepChoices
from engram_megatron.layouts.resume_judge import LAST_STEP, SAVED_STEP, OneRank

Choices = Sequence[StepChoices] | None  # the experts to replay; None: those that the run chooses


def train_and_save(rank: int, world_size: int, config: RunConfig, choices: Choices, folder: Path) -> RankRecord:
    """On each rank: the run that is never broken off. It saves into `folder` on its way."""
    run = SmallRun(config, rank, world_size)
    start = run.state()
    before, _ = train_steps(run, Plan(num_steps=SAVED_STEP, choices=choices), first=0)
    save(run, folder)
    after, _ = train_steps(run, Plan(num_steps=LAST_STEP, choices=choices), first=SAVED_STEP)
    return RankRecord(start, before + after, run.state(), [])


def load_and_go_on(
    rank: int, world_size: int, config: RunConfig, choices: Choices, source: Path, target: Path
) -> RankRecord:
    """On each rank: load `source`, save the same into `target`, and take the steps that are left."""
    run = SmallRun(config, rank, world_size)
    load(run, source)
    start = run.state()
    save(run, target)
    steps, _ = train_steps(run, Plan(num_steps=LAST_STEP, choices=choices), first=SAVED_STEP)
    return RankRecord(start, steps, run.state(), [])


def train_alone(rank: int, world_size: int, float64: RunConfig, float32: RunConfig) -> OneRank:
    """On the only rank."""
    exact = train_small_model(rank, world_size, float64, Plan(num_steps=LAST_STEP, record_choices=True))
    draws = [Plan(num_steps=LAST_STEP, choices=exact.choices, jitter=draw) for draw in range(FLOAT32_DRAWS + 1)]
    return OneRank(float64=exact, float32=[train_small_model(rank, world_size, float32, plan) for plan in draws])


def save(run: SmallRun, folder: Path) -> None:
    """Backbone and tables, as a checkpoint has them. Collective."""
    sums = FileSums(folder)
    save_backbone(folder / BACKBONE, run.chunks, run.optimizer, sums)
    if run.memory is not None:
        run.memory.finish()
        snapshot = TableSnapshot(run.memory.optimizer)
        if run.ranks.is_first:
            snapshot.create(folder / TABLES, sums)
        dist.barrier()
        with TableWriter(folder / TABLES, snapshot.description, sums) as writer:
            snapshot.write(writer)
        snapshot.close()
    dist.barrier()


def load(run: SmallRun, folder: Path) -> None:
    """What `save` wrote under any layout. Collective."""
    load_backbone(folder / BACKBONE, run.chunks, run.optimizer)
    if run.memory is not None:
        load_shard(folder / TABLES, run.memory.optimizer)
        run.memory.share_initial()
    dist.barrier()
