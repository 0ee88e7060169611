"""Large checkpoints of noise, for programs that only move them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from engram_checkpoints.offline_writer import OfflineWriter
from engram_checkpoints.table_format import TableDescription
from engram_checkpoints.tensor_source import TensorInfo
from engram_checkpoints.train_state import TrainState
from engram_kernels.row_state import RowState
from engram_megatron.overrides import to_dict
from engram_megatron.presets import engram_tiny


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
    writer.finish(_train_state(step), step)
    return folder


def noisy_rows(start: int, stop: int) -> RowState:
    rng = np.random.default_rng(start)
    rows: Any = rng.random((stop - start, 3 * 80), np.float32)
    last_step = np.full(stop - start, 5, np.int32)
    return RowState(rows[:, :80].copy(), rows[:, 80:].copy(), last_step)


def _train_state(step: int) -> TrainState:
    return TrainState(
        step=step,
        tokens_seen=32 * step,
        world_size=1,
        corpus_fingerprint="c" * 64,
        tokenizer_sha256="t" * 64,
        hash_identity={"seed": 0, "multipliers": [3, 5]},
        config=to_dict(engram_tiny()),
    )
