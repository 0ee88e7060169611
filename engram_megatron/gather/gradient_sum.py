"""The gradient of a step's distinct rows, summed over microbatches where the model is.

Shape legend: U distinct rows of this rank's batch, D row_dim. Sums are float32 (float64 of a float64 table), in the
order of the calls and of the ids in them, and bit-identical from run to run.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engram_kernels.scatter_add import scatter_add_rows
from engram_kernels.segment_sum import Empty

NUMPY_DTYPES = {torch.float32: np.float32, torch.float64: np.float64}


class HostGradient:
    """In host memory. `shape` [U, D]; `empty` makes the array, when the first gradient comes."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, empty: Empty) -> None:
        self.dtype = dtype
        self._make = lambda: empty(shape, NUMPY_DTYPES[dtype])
        self._sums: NDArray[Any] | None = None
        self._is_begun = np.zeros(shape[0], np.bool_)

    def add(self, places: Tensor, gradient: Tensor) -> None:
        """Add `gradient` [..., D] to the rows at `places` int64 [...]."""
        if self._sums is None:
            self._sums = self._make()
        rows = gradient.reshape(-1, gradient.shape[-1]).to(self.dtype).contiguous()
        scatter_add_rows(self._sums, self._is_begun, places.reshape(-1).numpy(), rows.numpy())

    def on_host(self) -> NDArray[Any]:
        """[U, D], zero for rows that no loss depended on. Nothing may be added any more."""
        sums = self._make() if self._sums is None else self._sums
        sums[~self._is_begun] = 0
        return sums


class DeviceGradient:
    """On a GPU, and copied to an array that `empty` makes in the end. `shape` [U, D]."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, empty: Empty, device: torch.device) -> None:
        self._sums = torch.zeros(shape, dtype=dtype, device=device)
        self._empty = empty

    def add(self, places: Tensor, gradient: Tensor) -> None:
        """Add `gradient` [..., D] to the rows at `places` int64 [...]."""
        flat, rows = places.reshape(-1), gradient.reshape(-1, gradient.shape[-1]).to(self._sums.dtype)
        # On a GPU index_add_ adds in any order; this one sorts first.
        distinct, within = torch.unique(flat, return_inverse=True)
        self._sums[distinct] += torch.ops.aten.embedding_dense_backward(rows, within, distinct.numel(), -1, False)

    def on_host(self) -> NDArray[Any]:
        """[U, D], zero for rows that no loss depended on."""
        sums = self._empty(tuple(self._sums.shape), NUMPY_DTYPES[self._sums.dtype])
        torch.from_numpy(sums).copy_(self._sums)
        return sums
