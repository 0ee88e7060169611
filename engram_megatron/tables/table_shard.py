"""One rank's rows of the Engram tables with their Adam moments, in host memory that its node shares.

No rank holds a whole table. `engram_kernels.row_state` says what is kept per row. Between its gradients a row is left
as its last one made it; `CatchUp` says what has become of it since.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from engram_kernels.catch_up import CatchUp
from engram_kernels.gather_rows import gather_rows
from engram_kernels.row_adam import read_rows
from engram_kernels.row_state import RowState, compute_dtype, state_width
from engram_kernels.split_float import bfloat16_to_float32, round_to_bfloat16
from engram_megatron.config_fields import DType
from engram_megatron.tables.host_memory import LAST_STEP_BYTES, check_host_memory, stored_dtype
from engram_megatron.tables.node_memory import HugePages, MemoryHandle, NodeMemory
from engram_megatron.tables.row_init import fill_initial_rows, initial_rows
from engram_megatron.tables.row_layout import Block, RowLayout

ALIGNMENT = 2 * 1024**2  # arrays start at borders of huge pages


@dataclass(frozen=True)
class InitialRows:
    """Where rows start: N(0, std^2), a function of seed and row id alone (see `row_init`)."""

    seed: int
    std: float


@dataclass(frozen=True, kw_only=True)
class ShardHandle:
    """All that another process of the node needs to open a shard."""

    layout: RowLayout
    shard: int
    row_dim: int
    dtype: DType
    commit: Literal["eager", "lazy"]
    memory: MemoryHandle


class TableShard:
    """Rows of `shard` under `layout`: `rows`.

    `commit = "lazy"`: a row that never had a gradient is not in memory; it is what `initialize` said, made when it is
    read. `float64` is for tests of equality. Only the rank that made the shard writes to it.

    Raises `UsageError` where the host has not enough memory for its `shards_on_host` shards (`touched_rows` of each, if
    lazy). Nothing is resident before `initialize` or a load writes it, so let all ranks of a host construct their
    shards before any of them goes on (a barrier), and each sees the same free memory.
    """

    def __init__(
        self,
        layout: RowLayout,
        shard: int,
        row_dim: int,
        dtype: DType = "float32",
        *,
        commit: Literal["eager", "lazy"] = "eager",
        huge_pages: HugePages = "none",
        shards_on_host: int = 1,
        touched_rows: int = 0,
    ) -> None:
        check_host_memory(layout, row_dim, dtype, shards_on_host, touched_rows if commit == "lazy" else None)
        size = _offsets(layout.num_local_rows(shard), row_dim, dtype)[-1]
        self._place(layout, shard, row_dim, dtype, commit, NodeMemory.create(size, huge_pages))

    @classmethod
    def open(cls, handle: ShardHandle, initial: InitialRows | None = None) -> TableShard:
        """A shard of another rank of this node, to read from; `initial` is what it was initialized with, if lazy.

        Raises `UsageError` where the system does not let this process see it.
        """
        shard = cls.__new__(cls)
        memory = NodeMemory.open(handle.memory)
        shard._place(handle.layout, handle.shard, handle.row_dim, handle.dtype, handle.commit, memory)
        shard.initial = initial
        return shard

    def _place(
        self,
        layout: RowLayout,
        shard: int,
        row_dim: int,
        dtype: DType,
        commit: Literal["eager", "lazy"],
        memory: NodeMemory,
    ) -> None:
        assert 0 <= shard < layout.num_shards, (shard, layout)
        self.layout = layout
        self.shard = shard
        self.row_dim = row_dim
        self.dtype = dtype
        self.commit = commit
        self.memory = memory
        self.initial: InitialRows | None = None
        num_rows, stored = layout.num_local_rows(shard), stored_dtype(dtype)
        state_at, last_step_at, _ = _offsets(num_rows, row_dim, dtype)
        self.rows = RowState(
            memory.array((num_rows, row_dim), stored),
            memory.array((num_rows, state_width(stored, row_dim)), compute_dtype(stored), state_at),
            memory.array((num_rows,), np.dtype(np.int32), last_step_at),
        )

    @property
    def handle(self) -> ShardHandle:
        return ShardHandle(
            layout=self.layout,
            shard=self.shard,
            row_dim=self.row_dim,
            dtype=self.dtype,
            commit=self.commit,
            memory=self.memory.handle,
        )

    @property
    def wide(self) -> np.dtype[Any]:
        """The type of exact weights, moments and gradients: float32, or float64 for a float64 table."""
        return self.rows.state.dtype

    @property
    def num_rows(self) -> int:
        return self.rows.num_rows

    def initialize(self, seed: int, std: float) -> None:
        """Set the rows to their initial values N(0, std^2); a lazy shard notes what they are."""
        self.initial = InitialRows(seed, std)
        if self.commit == "lazy":
            return
        self.memory.commit()
        for block in self.layout.blocks(self.shard):
            self.set_initial(block)

    def set_initial(self, block: Block) -> None:
        """Write the initial values of a block's rows."""
        assert self.initial is not None
        values = np.empty((block.num_rows, self.row_dim), self.wide)
        fill_initial_rows(values, block.start, self.initial.seed, self.initial.std)
        self.rows.set_master(block.local, values)

    def masters(self, block: Block) -> NDArray[Any]:
        """A copy of the exact weights of a block's rows as of each row's last step, [n, row_dim] `wide`."""
        values = self.rows.master(block.local)
        if self.commit == "lazy":
            unmade = np.flatnonzero(self.rows.last_step[block.local] == 0)
            values[unmade] = self._initial(unmade + block.local_start)
        return values

    def read(
        self,
        local_rows: NDArray[np.int64],
        catch_up: CatchUp | None,
        out: NDArray[Any] | None = None,
        places: NDArray[np.int64] | None = None,
    ) -> NDArray[Any]:
        """The rows at `local_rows` int64 [n] as of `catch_up.step` (None: as they stand), as `rows.weight` stores them.
        Nothing is written but `out`, a new [n, row_dim] if not given; with `places` int64 [n], row i goes to
        out[places[i]].

        Raises `IndexError` for a row outside the shard.
        """
        out = np.empty((local_rows.size, self.row_dim), self.rows.weight.dtype) if out is None else out
        if self.commit == "eager":
            self._copy(local_rows, catch_up, out, places)
            return out
        places = np.arange(local_rows.size) if places is None else places
        made = self.rows.last_step[local_rows] > 0
        self._copy(local_rows[made], catch_up, out, places[made])
        values = self._initial(local_rows[~made])
        out[places[~made]] = round_to_bfloat16(values) if self.rows.is_split else values
        return out

    def _copy(
        self, rows: NDArray[np.int64], catch_up: CatchUp | None, out: NDArray[Any], places: NDArray[np.int64] | None
    ) -> None:
        if catch_up is None:
            gather_rows(self.rows.weight, rows, out, places)
        else:
            read_rows(self.rows, rows, out, catch_up, places)

    def finished(self, catch_up: CatchUp | None) -> NDArray[Any]:
        """A copy of all rows as of `catch_up.step`, as numbers of `wide` [n, row_dim]: for small tables."""
        values = self.read(np.arange(self.num_rows), catch_up)
        return bfloat16_to_float32(values) if self.rows.is_split else values

    def finished_masters(self, block: Block, catch_up: CatchUp | None) -> NDArray[Any]:
        """A copy of the exact weights of a block's rows as of `catch_up.step`, [n, row_dim] `wide`."""
        values = self.masters(block)
        if catch_up is not None:
            rows = self.rows.part(block.local)
            whole = RowState(values.copy(), rows.state[:, : 2 * self.row_dim].copy(), rows.last_step)
            read_rows(whole, np.arange(block.num_rows), values, catch_up)
        return values

    def make(self, local_rows: NDArray[np.int64]) -> None:
        """Bring rows of a lazy shard into memory that never were, before they are updated."""
        if self.commit == "lazy":
            unmade = local_rows[self.rows.last_step[local_rows] == 0]
            self.rows.set_master(unmade, self._initial(unmade))

    def _initial(self, local_rows: NDArray[np.int64]) -> NDArray[Any]:
        assert self.initial is not None
        rows = self.layout.global_row(self.shard, local_rows)
        return initial_rows(rows, self.row_dim, self.wide, self.initial.seed, self.initial.std)


def _offsets(num_rows: int, row_dim: int, dtype: DType) -> tuple[int, int, int]:
    """Where in a shard's memory the state and the last steps begin, and where they end."""
    stored = stored_dtype(dtype)
    state_bytes = state_width(stored, row_dim) * compute_dtype(stored).itemsize
    state_at = _aligned(num_rows * row_dim * stored.itemsize)
    last_step_at = _aligned(state_at + num_rows * state_bytes)
    return state_at, last_step_at, last_step_at + num_rows * LAST_STEP_BYTES


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
