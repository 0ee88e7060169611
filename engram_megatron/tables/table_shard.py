"""One rank's rows of the Engram tables with their Adam moments, where its node can read them.

No rank holds a whole table. `engram_kernels.row_state` says what is kept per row, `row_store` where. Between its
gradients a row is left as its last one made it; `CatchUp` says what has become of it since.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram_kernels.catch_up import CatchUp
from engram_kernels.row_adam import read_rows
from engram_kernels.row_state import RowState
from engram_kernels.split_float import bfloat16_to_float32, round_to_bfloat16
from engram_megatron.config_fields import DType
from engram_megatron.tables.host_rows import HostPlacement, HostRows
from engram_megatron.tables.node_memory import NodeMemory
from engram_megatron.tables.row_init import fill_initial_rows, initial_rows
from engram_megatron.tables.row_layout import Block, RowLayout
from engram_megatron.tables.row_store import Commit, Placement, RowFormat, RowPart, RowStore, StoreHandle
from engram_megatron.tables.update_observer import UpdateObserver


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
    placement: Placement
    store: StoreHandle
    format: RowFormat

    @property
    def table(self) -> str:
        """What all shards of one table have in common, in words."""
        layout = self.layout
        return (
            f"{layout.total_rows} rows of {self.format.row_dim} {self.format.dtype} numbers in blocks of "
            f"{layout.block_rows} over {layout.num_shards} ranks on {layout.num_nodes} nodes, {self.placement}, "
            f"{self.format.moments} moments"
        )


class TableShard:
    """Rows of `shard` under `layout`, in `store`.

    Where the store is sparse, a row that never had a gradient is not in it; it is what `initialize` said, made when it
    is read. `float64` is for tests of equality. Only the rank that made the shard writes to it.

    Raises `UsageError` where the host has no room for its `shards_on_host` shards (`touched_rows` of each, if lazy).
    Nothing is resident before `initialize` or a load writes it, so let all ranks of a host construct their
    shards before any of them goes on (a barrier), and each sees the same free memory.
    """

    def __init__(
        self,
        layout: RowLayout,
        shard: int,
        row_dim: int,
        dtype: DType = "float32",
        *,
        placement: Placement | None = None,
        moments: int = 2,
        shards_on_host: int = 1,
        touched_rows: int = 0,
    ) -> None:
        placement, row_format = placement or HostPlacement(), RowFormat(row_dim, dtype, moments)
        placement.check(layout, row_format, shards_on_host, touched_rows)
        self._place(layout, shard, placement, placement.create(layout.num_local_rows(shard), row_format))

    @classmethod
    def open(cls, handle: ShardHandle, initial: InitialRows | None = None) -> TableShard:
        """A shard of another rank of this node, to read from; `initial` is what it was initialized with, if sparse.

        Raises `UsageError` where the system does not let this process see it.
        """
        shard = cls.__new__(cls)
        shard._place(handle.layout, handle.shard, handle.placement, handle.store.open())
        shard.initial = initial
        return shard

    def _place(self, layout: RowLayout, shard: int, placement: Placement, store: RowStore) -> None:
        assert 0 <= shard < layout.num_shards, (shard, layout)
        self.layout = layout
        self.shard = shard
        self.placement = placement
        self.store = store
        self.initial: InitialRows | None = None
        self.touched_rows = 0  # that ever had a gradient
        self.observer: UpdateObserver | None = None

    @property
    def handle(self) -> ShardHandle:
        return ShardHandle(
            layout=self.layout,
            shard=self.shard,
            placement=self.placement,
            store=self.store.handle,
            format=self.store.format,
        )

    @property
    def row_dim(self) -> int:
        return self.store.format.row_dim

    @property
    def dtype(self) -> DType:
        return self.store.format.dtype

    @property
    def moments(self) -> int:
        """Numbers that the optimizer keeps of each weight."""
        return self.store.format.moments

    @property
    def stored(self) -> np.dtype[Any]:
        """How weights are stored and read: the bits of bfloat16 as uint16."""
        return self.store.format.stored

    @property
    def wide(self) -> np.dtype[Any]:
        """The type of exact weights, moments and gradients: float32, or float64 for a float64 table."""
        return self.store.format.wide

    @property
    def commit(self) -> Commit:
        return self.placement.commit

    @property
    def memory(self) -> NodeMemory:
        """The host's memory that the shard takes."""
        return self.store.memory

    @property
    def num_rows(self) -> int:
        return self.last_step.size

    @property
    def last_step(self) -> NDArray[np.int32]:
        """Of all rows, int32 [num_rows], see `row_state`."""
        return self.store.last_step

    @property
    def rows(self) -> RowState:
        """All rows as arrays: of a shard in host memory."""
        assert isinstance(self.store, HostRows), "rows that lie in a file are read and written by number"
        return self.store.table

    @property
    def makes_rows(self) -> bool:
        """Whether rows that never had a gradient are not stored but made from the seed."""
        return self.store.is_sparse and self.initial is not None

    def initialize(self, seed: int, std: float) -> None:
        """Set the rows to their initial values N(0, std^2); a sparse shard notes what they are."""
        self.initial = InitialRows(seed, std)
        self.take_space()
        for block in self.layout.blocks(self.shard):
            self.set_initial(block)

    def take_space(self) -> None:
        """Take all memory and disk space now, unless lazy."""
        if self.commit == "eager":
            self.store.commit()

    def set_initial(self, block: Block) -> None:
        """Write the initial values of a block's rows, where they are stored at all."""
        assert self.initial is not None
        if self.makes_rows:
            return
        values = np.empty((block.num_rows, self.row_dim), self.wide)
        fill_initial_rows(values, block.start, self.initial.seed, self.initial.std)
        self.write(np.arange(block.local.start, block.local.stop), without_history(values, self.moments))

    def write(self, local_rows: NDArray[np.int64], values: RowState) -> None:
        """Set `local_rows` int64 [n], before any row is updated, to `values`, which are as `exact` gives them."""
        self.store.write(local_rows, values)

    def exact(self, local_rows: NDArray[np.int64]) -> RowState:
        """A copy of `local_rows` int64 [n] as of each row's last step, its weights exact: [n, row_dim] `wide`."""
        values = self.store.exact(local_rows)
        if self.makes_rows:
            unmade = values.last_step == 0
            values.weight[unmade] = self._initial(local_rows[unmade])
        return values

    def masters(self, local_rows: NDArray[np.int64]) -> NDArray[Any]:
        """The weights of `exact`."""
        return self.exact(local_rows).weight

    def read(
        self,
        local_rows: NDArray[np.int64],
        catch_up: CatchUp | None,
        out: NDArray[Any] | None = None,
        places: NDArray[np.int64] | None = None,
    ) -> NDArray[Any]:
        """The rows at `local_rows` int64 [n] as of `catch_up.step` (None: as they stand), as they are `stored`.
        Nothing is written but `out`, a new [n, row_dim] if not given; with `places` int64 [n], row i goes to
        out[places[i]].

        Raises `IndexError` for a row outside the shard.
        """
        out = np.empty((local_rows.size, self.row_dim), self.stored) if out is None else out
        if not self.makes_rows:
            self.store.read(local_rows, catch_up, out, places)
            return out
        places = np.arange(local_rows.size) if places is None else places
        made = self.last_step[local_rows] > 0
        self.store.read(local_rows[made], catch_up, out, places[made])
        values = self._initial(local_rows[~made])
        out[places[~made]] = round_to_bfloat16(values) if self.dtype == "bfloat16" else values
        return out

    def read_ahead(self, local_rows: NDArray[np.int64]) -> None:
        """Say that `local_rows` int64 [n] will be read soon."""
        self.store.read_ahead(local_rows)

    def finished(self, catch_up: CatchUp | None) -> NDArray[Any]:
        """A copy of all rows as of `catch_up.step`, as numbers of `wide` [n, row_dim]: for small tables."""
        values = self.read(np.arange(self.num_rows), catch_up)
        return bfloat16_to_float32(values) if self.dtype == "bfloat16" else values

    def finished_masters(self, local_rows: NDArray[np.int64], catch_up: CatchUp | None) -> NDArray[Any]:
        """As `masters`, as of `catch_up.step` (None: as they stand)."""
        whole = self.exact(local_rows)
        if catch_up is None:
            return whole.weight
        values = np.empty_like(whole.weight)
        read_rows(whole, np.arange(local_rows.size), values, catch_up)
        return values

    def touch(self, local_rows: NDArray[np.int64]) -> None:
        """Count rows that are to have their first gradient now."""
        self.touched_rows += int(np.count_nonzero(self.last_step[local_rows] == 0))

    def updating(self, local_rows: NDArray[np.int64]) -> Iterator[RowPart]:
        """`local_rows` int64 [n], strictly rising, part by part in memory, each to be updated before the next is asked
        for. Rows that are not stored yet are made."""
        self._announce(local_rows, sweep=False)
        is_new = self._is_unmade(local_rows)
        return self._made(local_rows, is_new, self.store.updating(local_rows, is_new))

    def sweeping(self, local_rows: NDArray[np.int64]) -> Iterator[RowPart]:
        """As `updating`; beside `local_rows` the tables of the parts hold all rows that ever had a gradient, to be
        updated too."""
        self._announce(local_rows, sweep=True)
        is_new = self._is_unmade(local_rows)
        return self._made(local_rows, is_new, self.store.sweeping(local_rows, is_new))

    def _announce(self, local_rows: NDArray[np.int64], *, sweep: bool) -> None:
        observer = self.observer
        if observer is not None:
            observer.before_update(local_rows, sweep=sweep)

    def _is_unmade(self, local_rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        unmade: NDArray[np.bool_] = (self.last_step[local_rows] == 0) & self.makes_rows
        return unmade

    def _made(
        self, local_rows: NDArray[np.int64], is_new: NDArray[np.bool_], parts: Iterator[RowPart]
    ) -> Iterator[RowPart]:
        """`parts`, in which the weights of those of `local_rows` that are new are made."""
        for part in parts:
            new = np.flatnonzero(is_new[part.order])
            if new.size:
                part.table.set_master(part.places[new], self._initial(local_rows[part.order][new]))
            yield part

    def _initial(self, local_rows: NDArray[np.int64]) -> NDArray[Any]:
        assert self.initial is not None
        rows = self.layout.global_row(self.shard, local_rows)
        return initial_rows(rows, self.row_dim, self.wide, self.initial.seed, self.initial.std)


def without_history(weights: NDArray[Any], moments: int = 2) -> RowState:
    """Rows of exact `weights` [n, row_dim] that never had a gradient."""
    n, row_dim = weights.shape
    return RowState(weights, np.zeros((n, moments * row_dim), weights.dtype), np.zeros(n, np.int32))
