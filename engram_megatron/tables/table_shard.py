"""One rank's rows of the Engram tables with their Adam moments, in host memory. No rank holds a whole table."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from engram_megatron.tables.host_memory import check_host_memory
from engram_megatron.tables.row_init import fill_initial_rows
from engram_megatron.tables.row_layout import RowLayout

TableDType = Literal["float32", "float64"]


class TableShard:
    """Rows of `shard` under `layout`: `weight`, `exp_avg`, `exp_avg_sq` [num_local_rows, row_dim].

    `touched` bool [num_local_rows] says which rows ever had a gradient; the moments of all others are zero.
    `step_count` is the number of optimizer steps that the rows have seen; it belongs to the state, as the moments do.
    `float64` is for tests of equality.

    Raises `UsageError` where the host has not enough memory for its `shards_on_host` shards. Nothing is resident
    before `initialize` or a load writes it, so let all ranks of a host construct their shards before any of them goes
    on (a barrier), and each sees the same free memory.
    """

    def __init__(
        self, layout: RowLayout, shard: int, row_dim: int, dtype: TableDType = "float32", *, shards_on_host: int = 1
    ) -> None:
        assert 0 <= shard < layout.num_shards, (shard, layout)
        self.layout = layout
        self.shard = shard
        self.row_dim = row_dim
        self.dtype = np.dtype(dtype)
        check_host_memory(layout, row_dim, self.dtype.itemsize, shards_on_host)
        shape = (layout.num_local_rows(shard), row_dim)
        self.weight: NDArray[Any] = np.zeros(shape, self.dtype)
        self.exp_avg: NDArray[Any] = np.zeros(shape, self.dtype)
        self.exp_avg_sq: NDArray[Any] = np.zeros(shape, self.dtype)
        self.touched: NDArray[np.bool_] = np.zeros(shape[0], np.bool_)
        self.step_count = 0

    @property
    def num_rows(self) -> int:
        return int(self.weight.shape[0])

    def initialize(self, seed: int, std: float) -> None:
        """Set the rows to their initial values N(0, std^2), a function of seed and row id alone (see `row_init`)."""
        for block in self.layout.blocks(self.shard):
            fill_initial_rows(self.weight[block.local], block.start, seed, std)

    def read(self, local_rows: NDArray[np.int64]) -> NDArray[Any]:
        """A copy [n, row_dim] of the rows at `local_rows` int64 [n]; `IndexError` for one outside the shard."""
        # torch's gather runs on all of torch's threads, numpy's on one.
        return torch.from_numpy(self.weight).index_select(0, torch.from_numpy(local_rows)).numpy()
