"""Whole checkpoints for tests of the offline tools: of a small trained model, and large ones of noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from engram_checkpoints.checkpoint_files import FileSums, complete
from engram_checkpoints.offline_writer import OfflineWriter
from engram_checkpoints.table_format import TableDescription
from engram_checkpoints.tensor_source import TensorInfo
from engram_checkpoints.train_state import TrainState
from engram_kernels.row_state import RowState
from engram_megatron.config import RunConfig
from engram_megatron.layouts.small_model import small_model_config
from engram_megatron.overrides import to_dict
from engram_megatron.presets import engram_tiny

STEPS = 2
# Masters beside bfloat16 weights, compressed queries, an embedding on two stages, experts, four streams.
MODEL = ("model.attention.query_lora_rank=8", "model.mtp.num_layers=1")


def model_config(*overrides: str) -> RunConfig:
    return small_model_config("bfloat16", [*MODEL, *overrides])


def train_state(config: RunConfig, world_size: int = 1, step: int = STEPS) -> TrainState:
    return TrainState(
        step=step,
        tokens_seen=32 * step,
        world_size=world_size,
        corpus_fingerprint="c" * 64,
        tokenizer_sha256="t" * 64,
        hash_identity={"seed": 0, "multipliers": [3, 5]},
        config=to_dict(config),
    )


def train_and_save(rank: int, world_size: int, config: RunConfig, folder: Path) -> None:
    """On each rank: two steps, and a complete checkpoint of them."""
    from engram_megatron.layouts.rank_run import SmallRun, train_steps
    from engram_megatron.layouts.records import Plan
    from engram_megatron.layouts.resume_case import save

    run = SmallRun(config, rank, world_size)
    train_steps(run, Plan(num_steps=STEPS), first=0)
    save(run, folder)
    if rank == 0:
        mark_complete(folder, train_state(config, world_size))


def mark_complete(folder: Path, state: TrainState) -> None:
    """With the sums of what stands in `folder`."""
    sums = FileSums(folder)
    for path in folder.rglob("*"):
        if path.is_file():
            sums.add_written(path)
    state.write(folder, sums)
    complete(folder, sums.flush())


class Noise:
    """A `TensorSource` whose tensors are made when they are read: two of Adam's moments and a weight of one shape."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        weight = "embedding.word_embeddings.weight"
        names = (weight, f"optimizer.exp_avg.{weight}", f"optimizer.exp_avg_sq.{weight}")
        self.tensors = {name: TensorInfo(shape, torch.float32) for name in names}

    def read(self, name: str, rows: slice = slice(None)) -> torch.Tensor:
        shape = self.tensors[name].shape
        start, stop, _ = rows.indices(shape[0])
        generator = torch.Generator().manual_seed(start + len(name))
        return torch.empty((stop - start, *shape[1:])).random_(generator=generator)


def write_noise(folder: Path, tensor_rows: int, table_rows: int, step: int = 7, width: int = 1024) -> Path:
    """A checkpoint of 3 * tensor_rows * 4 KiB of backbone and as much per table row of 80 columns as that takes."""
    source = Noise((tensor_rows, width))
    writer = OfflineWriter(folder)
    for name in source.tensors:
        writer.backbone.add(name, source)
    description = TableDescription(
        total_rows=table_rows,
        row_dim=80,
        block_rows=4096,
        dtype="float32",
        step_count=step,
        update="dense",
        catch_up={"beta1": 0.9, "beta2": 0.95, "eps": 1e-20},
        initial={"seed": 3, "std": 0.02},
    )
    writer.write_tables(description, np.full(step, 1e-3), noisy_rows)
    writer.finish(train_state(engram_tiny(), step=step), step)
    return folder


def noisy_rows(start: int, stop: int) -> RowState:
    rng = np.random.default_rng(start)
    rows: Any = rng.random((stop - start, 3 * 80), np.float32)
    last_step = np.full(stop - start, 5, np.int32)
    return RowState(rows[:, :80].copy(), rows[:, 80:].copy(), last_step)


def flip_a_byte(file: Path, place: float = 0.5) -> None:
    content = bytearray(file.read_bytes())
    content[int(len(content) * place)] ^= 1
    file.write_bytes(content)
