"""The distinct rows of a step on the model's device, differentiable, arriving in waves.

Shape legend: U distinct rows of this rank's batch, D row_dim.
"""

from __future__ import annotations

from types import EllipsisType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engram_kernels.segment_sum import Empty
from engram_megatron import platform
from engram_megatron.config_fields import DType
from engram_megatron.gather.gradient_sum import DeviceGradient, HostGradient
from engram_megatron.gather.plan import GatherPlan, Reads, Route
from engram_megatron.gather.statistics import GatherStatistics

TORCH_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
Index = int | slice | EllipsisType | tuple[int | slice | EllipsisType, ...]


class UniqueRows:
    """The rows of a step on one rank.

    `stored` [U, D]: the rows as the tables' weights are stored, on the host; those of a wave are there once it was
    fetched (`RowLookup.fetch`). `values` [U, D]: the same as numbers on the model's device, after `to_device`.
    `gradient` holds what `expand`'s backward found, summed over microbatches.
    """

    def __init__(
        self,
        plan: GatherPlan,
        route: Route,
        reads: list[list[Reads]],
        statistics: GatherStatistics,
        stored: NDArray[Any],
        dtype: DType,
        empty: Empty,
    ) -> None:
        """`stored` is to be filled; `empty` makes the array on the host in which gradients end."""
        self.plan = plan
        self.route = route
        self.reads = reads
        self.statistics = statistics
        device = platform.device()
        is_bits = dtype == "bfloat16"  # which torch knows and numpy does not
        on_host = torch.from_numpy(stored.view(np.int16) if is_bits else stored).view(TORCH_DTYPES[dtype])
        self.stored = stored
        self.values = on_host if device.type == "cpu" else torch.empty_like(on_host, device=device)
        self._on_host = on_host
        self._inverse = torch.from_numpy(plan.inverse).to(device)
        wide = torch.float64 if dtype == "float64" else torch.float32
        self.gradient = (
            HostGradient(stored.shape, wide, empty)
            if device.type == "cpu"
            else DeviceGradient(stored.shape, wide, empty, device)
        )
        # What autograd follows: the rows themselves are not in its graph, so that a wave may still fill them.
        self._anchor = torch.zeros((), dtype=wide, device=device, requires_grad=True)

    def to_device(self, wave: int) -> None:
        """Copy a wave that has been fetched to the model's device."""
        if self.values is self._on_host:
            return
        places = torch.from_numpy(np.flatnonzero(self.plan.waves == wave))
        rows = self._on_host.index_select(0, places).to(self.values.device)
        self.values.index_copy_(0, places.to(self.values.device), rows)

    def expand(self, index: Index = ..., dtype: torch.dtype | None = None) -> Tensor:
        """Rows of `ids[index]` with a last dimension of D added, in `dtype` (default: that of the tables' weights).

        `index` is basic indexing of the ids that were asked for. With the microbatch as the ids' first dimension,
        `expand(i)` is the memory of microbatch i. The backward adds to `gradient` in float32 (float64), in the order of
        the ids, and is bit-identical from run to run.
        """
        memory: Tensor = _Expand.apply(self._anchor, self, self._inverse[index], dtype or self.values.dtype)
        return memory


class _Expand(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, rows: UniqueRows, inverse: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.rows, ctx.inverse, ctx.anchor = rows, inverse, anchor
        return torch.nn.functional.embedding(inverse, rows.values).to(dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        ctx.rows.gradient.add(ctx.inverse, gradients[0])
        return torch.zeros_like(ctx.anchor), None, None, None
