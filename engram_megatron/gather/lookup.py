"""The rows of a rank's batch as one differentiable tensor, and the way of their gradients to the owners.

    plan      distinct rows of the batch, grouped by owner
    start     counts, then ids to the owners; owners read; rows back
    wait      the rows become an autograd leaf on the model's device
    expand    the rows of one microbatch, by backward accumulated in the leaf's gradient
    return    gradients to the owners, which add up what several ranks found for a row

Shape legend: U distinct rows of this rank's batch, R rows asked of this rank by all ranks together, D row_dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import EllipsisType

import numpy as np
import torch
from numpy.typing import NDArray

from engram_kernels.segment_sum import sum_by_row
from engram_megatron import platform
from engram_megatron.gather.plan import GatherPlan, make_plan
from engram_megatron.gather.statistics import GatherStatistics
from engram_megatron.gather.transport import Transport, TransportError
from engram_megatron.tables.row_gradients import RowGradients
from engram_megatron.tables.row_layout import RowLayout
from engram_megatron.tables.table_shard import TableShard

ID_BYTES = 8
Index = int | slice | EllipsisType | tuple[int | slice | EllipsisType, ...]


@dataclass(frozen=True, eq=False)
class Requests:
    """What the ranks ask of this one: `local_rows` int64 [R], in the order of the asking ranks, of which
    `counts` int64 [size] each."""

    local_rows: NDArray[np.int64]
    counts: NDArray[np.int64]


class UniqueRows:
    """The rows of a batch. `values` [U, D] is an autograd leaf on the model's device, in the dtype of the table."""

    def __init__(
        self, plan: GatherPlan, requests: Requests, values_UD: torch.Tensor, statistics: GatherStatistics
    ) -> None:
        self.plan = plan
        self.requests = requests
        self.statistics = statistics
        self.values = values_UD.to(platform.device()).requires_grad_()
        self._inverse = torch.from_numpy(plan.inverse).to(self.values.device)

    def expand(self, index: Index = ...) -> torch.Tensor:
        """Rows of `ids[index]` with a last dimension of D added; `index` is basic indexing of the ids given to `start`.

        With the microbatch as the ids' first dimension, `expand(i)` is the memory of microbatch i. The backward adds
        into `values.grad` and is bit-identical from run to run (torch sums embedding gradients in index order on the
        CPU, by sorting on CUDA).
        """
        return torch.nn.functional.embedding(self._inverse[index], self.values)


class PendingRows:
    """A gather under way."""

    def __init__(self, rows: UniqueRows) -> None:
        self._rows = rows

    def wait(self) -> UniqueRows:
        """The rows, once they are here. Raises what went wrong on the way, `TransportError` among it."""
        return self._rows


class RowLookup:
    """Reads and differentiates rows of the whole table on every rank; `shard` is what this rank owns of it.

    `start` and `return_gradients` are collective over the transport's ranks: each rank calls them in the same order,
    ranks without an Engram layer with no ids.
    """

    def __init__(self, shard: TableShard, layout: RowLayout, transport: Transport) -> None:
        assert shard.layout == layout, (shard.layout, layout)
        assert (transport.size, transport.rank) == (layout.num_shards, shard.shard), (transport.size, layout)
        self.shard = shard
        self.layout = layout
        self.transport = transport

    def start(self, ids: NDArray[np.int64]) -> PendingRows:
        """Begin to fetch the rows of `ids` (int64 row ids, any shape, may be empty): all microbatches of a step.

        The shard must not change before `wait` returns.
        """
        plan = make_plan(ids, self.layout)
        requests = self._exchange_requests(plan)
        owned_RD = torch.from_numpy(self.shard.read(requests.local_rows))
        values_UD = self.transport.exchange(owned_RD, requests.counts, plan.owner_counts)
        return PendingRows(UniqueRows(plan, requests, values_UD, self._count(plan, requests)))

    def return_gradients(self, rows: UniqueRows) -> RowGradients:
        """Send the gradients in `rows.values.grad` to the owners and return those of this rank's own rows.

        A row's gradient is the sum over the ranks that used it, added in the order of ranks: bit-identical from run
        to run. Every row that was asked for is there, with zeros where no loss depended on it.
        """
        gradient_UD = rows.values.grad if rows.values.grad is not None else torch.zeros_like(rows.values)
        received_RD = self.transport.exchange(gradient_UD.cpu(), rows.plan.owner_counts, rows.requests.counts)
        return RowGradients(*sum_by_row(rows.requests.local_rows, received_RD.numpy()))

    def _exchange_requests(self, plan: GatherPlan) -> Requests:
        counts = self.transport.exchange_counts(plan.owner_counts)
        asked = self.transport.exchange(torch.from_numpy(plan.unique_rows), plan.owner_counts, counts).numpy()
        self._check_requests(asked, counts)
        return Requests(self.layout.local_index(asked), counts)

    def _check_requests(self, rows: NDArray[np.int64], counts: NDArray[np.int64]) -> None:
        """Raise `TransportError` for an id that this rank cannot have been asked for, naming who sent it."""
        known = (rows >= 0) & (rows < self.layout.total_rows) & (self.layout.owner(rows) == self.shard.shard)
        if known.all():
            return
        first = int(np.flatnonzero(~known)[0])
        source = int(np.searchsorted(np.cumsum(counts), first, side="right"))
        raise TransportError(
            f"rank {self.shard.shard} was asked by rank {source} for row {int(rows[first])}, which is none of its rows "
            f"({int((~known).sum())} of {rows.size} ids are wrong): either the ids were damaged on the way from rank "
            f"{source}, or rank {source} uses another layout than {self.layout}"
        )

    def _count(self, plan: GatherPlan, requests: Requests) -> GatherStatistics:
        row_bytes = self.shard.row_dim * self.shard.dtype.itemsize
        asked_elsewhere = plan.unique_rows.size - int(plan.owner_counts[self.shard.shard])
        asked_here = requests.local_rows.size - int(requests.counts[self.shard.shard])
        return GatherStatistics(
            lookups=plan.inverse.size,
            unique_rows=plan.unique_rows.size,
            id_bytes_sent=asked_elsewhere * ID_BYTES,
            id_bytes_received=asked_here * ID_BYTES,
            row_bytes_sent=asked_here * row_bytes,
            row_bytes_received=asked_elsewhere * row_bytes,
        )
