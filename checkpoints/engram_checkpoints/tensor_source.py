"""Whole tensors by their global names, read piece by piece, for programs that hold no model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from typing import NamedTuple, Protocol

import torch


class TensorInfo(NamedTuple):
    """Of a whole tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


class TensorSource(Protocol):
    """Where tensors can be read from. Names are those of `engram_checkpoints.backbone`."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """By name."""

    def read(self, name: str, rows: slice = slice(None)) -> torch.Tensor:
        """A copy of a tensor, or of `rows` along its first dimension (a slice of step 1). Raises `UsageError` where it
        cannot be read."""


def row_pieces(info: TensorInfo, max_bytes: int) -> Iterator[slice]:
    """The tensor's rows in pieces of at most `max_bytes` (at least one row each); all of a tensor without rows."""
    if not info.shape or not info.shape[0]:
        yield slice(None)
        return
    rows = info.shape[0]
    step = max(1, max_bytes * rows // max(1, info.num_bytes))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))
