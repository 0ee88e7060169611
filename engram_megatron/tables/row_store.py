"""Where the rows of a shard lie, behind one interface: a `Placement` says where and makes a `RowStore` there.

Rows are numbered 0 .. num_rows - 1 within the shard. Only the rank that made a store writes to it; ranks of its node
open it by its handle and read, never beside an update.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from engram_kernels.catch_up import CatchUp
from engram_kernels.gather_rows import gather_rows
from engram_kernels.row_adam import read_rows
from engram_kernels.row_state import RowState, compute_dtype, state_width
from engram_megatron.config_fields import DType
from engram_megatron.tables.node_memory import ArraySpec, NodeMemory
from engram_megatron.tables.row_layout import RowLayout

Int64 = NDArray[np.int64]
Commit = Literal["eager", "lazy"]


@dataclass(frozen=True)
class RowFormat:
    """The numbers of a row: `row_dim` weights of `dtype`, and their record (see `row_state`)."""

    row_dim: int
    dtype: DType
    moments: int = 2  # numbers that the optimizer keeps of each weight

    @property
    def stored(self) -> np.dtype[Any]:
        """How weights are stored: the bits of bfloat16 as uint16."""
        return np.dtype(np.uint16 if self.dtype == "bfloat16" else self.dtype)

    @property
    def wide(self) -> np.dtype[Any]:
        """The type of exact weights, moments and gradients: float32, or float64 for a float64 table."""
        return compute_dtype(self.stored)

    @property
    def state_width(self) -> int:
        return state_width(self.stored, self.row_dim, self.moments)

    def specs(self, num_rows: int) -> list[ArraySpec]:
        """Shape and type of each array of a `RowState` of `num_rows`."""
        return [
            ((num_rows, self.row_dim), self.stored),
            ((num_rows, self.state_width), self.wide),
            ((num_rows,), np.dtype(np.int32)),
        ]

    def empty(self, num_rows: int) -> RowState:
        """Rows to be written, with any content; not resident before that."""
        return RowState(*(np.empty(shape, dtype) for shape, dtype in self.specs(num_rows)))


@dataclass(frozen=True, eq=False)
class RowPart:
    """Some of the rows that were asked for, in memory to be updated: the i-th is the `order[i]`-th of those asked for,
    and lies at `places[i]` of `table`, which rise strictly."""

    order: slice | Int64
    table: RowState
    places: Int64


class RowStore(Protocol):
    """The rows of one shard, zero at the start. All row numbers are int64 [k]."""

    format: RowFormat
    memory: NodeMemory  # what it takes of the host's
    is_sparse: bool  # whether a row takes no space before it is written
    last_step: NDArray[np.int32]  # of all rows, see `row_state`

    @property
    def handle(self) -> StoreHandle: ...

    def commit(self) -> None:
        """Take all memory and disk space now, so that they cannot run out later."""

    def read(self, rows: Int64, catch_up: CatchUp | None, out: NDArray[Any], places: Int64 | None) -> None:
        """As `read_weights`. Raises `IndexError` for a row outside the shard."""

    def exact(self, rows: Int64) -> RowState:
        """A copy of `rows` as `RowState.exact` gives them."""

    def copy_to(self, rows: Int64, target: RowState, places: Int64) -> None:
        """Copy `rows`, as they are stored, to `places` of `target`. Another thread of this rank may call it beside an
        update; what it gets of rows that the update changes is then undefined."""

    def write(self, rows: Int64, values: RowState) -> None:
        """Set `rows`, before any was updated, to what `exact` gives."""

    def updating(self, rows: Int64, is_new: NDArray[np.bool_]) -> Iterator[RowPart]:
        """`rows`, strictly rising, part by part; each part is to be updated before the next is asked for. Those that
        `is_new` (bool [k]) were never written: they come with moments of zero and any weights."""

    def sweeping(self, rows: Int64, is_new: NDArray[np.bool_]) -> Iterator[RowPart]:
        """As `updating`; beside `rows` the tables of the parts hold all rows that ever had a gradient, to be updated
        too. (Others in them never had one: their last step is 0.)"""

    def read_ahead(self, rows: Int64) -> None:
        """Have `rows` brought near, from where reading them takes long; they will be read soon."""


class StoreHandle(Protocol):
    """Names a store to other processes of the node."""

    def open(self) -> RowStore:
        """Raises `UsageError` where the system does not let this process see it."""


class Placement(Protocol):
    """Where rows are to lie. `commit`: whether memory and disk space are taken at the start or as rows need them."""

    @property
    def commit(self) -> Commit: ...

    def check(self, layout: RowLayout, row_format: RowFormat, shards_on_host: int, touched_rows: int) -> None:
        """Raise `UsageError` where this host has no room for `shards_on_host` shards, of each of which `touched_rows`
        are expected to be updated."""

    def create(self, num_rows: int, row_format: RowFormat) -> RowStore: ...


def read_weights(
    table: RowState, rows: Int64, catch_up: CatchUp | None, out: NDArray[Any], places: Int64 | None
) -> None:
    """Weights of `rows` as of `catch_up.step` (None: as they stand), as `table` stores them, into out[i] or
    out[places[i]]."""
    if catch_up is None:
        gather_rows(table.weight, rows, out, places)
    else:
        read_rows(table, rows, out, catch_up, places)
