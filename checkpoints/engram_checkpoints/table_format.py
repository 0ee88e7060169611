"""Tables and their moments on disk: one zarr v3 group that knows no rank.

    tables.zarr/                attributes: those of `TableDescription`
      weight/                   [total_rows, row_dim] float32 (float64), one chunk per row block: c.<block>.0
      exp_avg/  exp_avg_sq/     likewise; the former alone where `update` is sinkhorn, whose momentum it is
      last_step/                [total_rows] int32, likewise: c.<block>
      learning_rates/           [step_count] float64, one chunk

A block has one writer, so a chunk is always written whole. Weights are exact: bfloat16 tables save the float32 numbers
that they are trained as. A row is saved as it stands, as of its `last_step`; what has become of it since follows from
that and the learning rates of all steps (see `CatchUp`, whose constants are `catch_up`), so nothing is brought up to
date for a save.

A row is left out (zeros stand in its place) where it can be had otherwise:

    initial    last_step = 0: it is what (seed, std, row id) says, see `engram_megatron.tables.row_init`
    base       last_step <= base.step_count: it is as in that checkpoint, which this one is a delta of

A chunk none of whose rows is stored is not written. Chunks carry a CRC-32C over the compressed bytes, so damage and
truncation are found; a missing chunk, which zarr would read as zeros, is looked for.

Compression is LZ4 without a shuffle: about 7 GB/s on float noise, which it leaves as it is, while rows left out and the
zeros of fresh moments vanish. A byte shuffle takes 5 % off the noise too, at a fifth of the speed, less than a disk's.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import BloscCodec, Crc32cCodec

from engram_checkpoints.checkpoint_files import FileSums, SummedStore
from engram_megatron.errors import UsageError
from engram_megatron.optimizer.row_optimizer import RowOptimizer

WEIGHT = "weight"
MOMENTS = ("exp_avg", "exp_avg_sq")  # of Adam; the first alone of balanced momentum
LAST_STEP, LEARNING_RATES = "last_step", "learning_rates"


@dataclass(frozen=True, kw_only=True)
class Base:
    """The checkpoint that a delta is relative to: a folder beside the delta's, and its identity."""

    checkpoint: str
    step_count: int
    manifest_crc32c: int


@dataclass(frozen=True, kw_only=True)
class TableDescription:
    """The attributes of the group. `step_count`: optimizer steps so far."""

    total_rows: int
    row_dim: int
    block_rows: int
    dtype: str  # of weights and moments
    step_count: int
    update: str  # `tables.update` of the run
    catch_up: dict[str, float] | None  # beta1, beta2, eps; None: rows stand as of the last step
    initial: dict[str, Any] | None  # seed, std; None: rows started from other weights
    base: Base | None = None

    @classmethod
    def of(cls, optimizer: RowOptimizer) -> TableDescription:
        """Of the table that `optimizer` updates a part of, as it stands."""
        shard, as_of = optimizer.shard, optimizer.read_as_of
        return cls(
            total_rows=shard.layout.total_rows,
            row_dim=shard.row_dim,
            block_rows=shard.layout.block_rows,
            dtype=shard.wide.name,
            step_count=optimizer.step_count,
            update=optimizer.rule,
            catch_up=None if as_of is None else {"beta1": as_of.beta1, "beta2": as_of.beta2, "eps": as_of.eps},
            initial=None if shard.initial is None else asdict(shard.initial),
        )

    @property
    def num_moments(self) -> int:
        """Numbers that the optimizer keeps of each weight."""
        return 1 if self.update == "sinkhorn" else 2

    @property
    def moments(self) -> tuple[str, ...]:
        """Names of their arrays."""
        return MOMENTS[: self.num_moments]

    def is_stored(self, last_step: NDArray[np.int32]) -> NDArray[np.bool_]:
        """Which rows, whose last steps these are, are not left out."""
        if self.base is not None:
            return last_step > self.base.step_count
        if self.initial is not None:
            return last_step > 0
        return np.ones(last_step.shape, np.bool_)


def create(path: Path, description: TableDescription, learning_rates: NDArray[np.float64], sums: FileSums) -> None:
    """Make the group without its rows. `learning_rates` float64 [step_count] are those of all steps. One rank calls it;
    a barrier must follow.

    Raises `UsageError` where something stands at `path` already.
    """
    assert learning_rates.shape == (description.step_count,)
    if path.exists():
        raise UsageError(f"{path} exists already; tables are never written over others, remove it first")
    group = zarr.open_group(SummedStore(path, sums), mode="w-", zarr_format=3, attributes=asdict(description))
    rows, dim, block = description.total_rows, description.row_dim, description.block_rows
    for name in (WEIGHT, *description.moments):
        _create_array(group, name, (rows, dim), (block, dim), np.dtype(description.dtype))
    _create_array(group, LAST_STEP, (rows,), (block,), np.dtype(np.int32))
    rates = _create_array(
        group, LEARNING_RATES, learning_rates.shape, (max(1, learning_rates.size),), np.dtype(np.float64)
    )
    rates[:] = learning_rates


def _create_array(group: Any, name: str, shape: tuple[int, ...], chunks: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
    return group.create_array(
        name,
        shape=shape,
        chunks=chunks,
        dtype=dtype.name,
        filters=None,
        compressors=[BloscCodec(cname="lz4", clevel=1, shuffle="noshuffle", typesize=dtype.itemsize), Crc32cCodec()],
        fill_value=0,
        chunk_key_encoding={"name": "default", "separator": "."},
        # By default zarr leaves out chunks of zeros; here a chunk that is not there is a lost one.
        config={"write_empty_chunks": True},
    )


def chunk_file(name: str, number: int) -> str:
    """Path below the group of chunk `number` of array `name`."""
    return f"{name}/c.{number}" + ("" if name in (LAST_STEP, LEARNING_RATES) else ".0")


def is_table_chunk(path: str) -> bool:
    """Whether a file of a checkpoint is a chunk of its tables, which carries a sum of its own."""
    return ".zarr/" in path and Path(path).name.startswith("c.")
