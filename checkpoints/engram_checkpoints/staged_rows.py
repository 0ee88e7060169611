"""Copies of rows that an update is about to change, kept until they have been written."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from engram_kernels.copy_rows import copy_rows
from engram_kernels.row_state import RowState
from engram_megatron.tables.row_store import RowStore

_INDEX_BYTES = 4  # of a copy: the place that is free again once it is written


class StagedRows:
    """Copies of rows of `store`, as they are stored, in at most `num_bytes`.

    Memory is resident as copies come, with 4 bytes for every row of the store. Not safe for several threads at once.
    """

    def __init__(self, store: RowStore, num_bytes: int) -> None:
        num_rows = store.last_step.size
        row_bytes = _INDEX_BYTES + sum(dtype.itemsize * int(np.prod(shape)) for shape, dtype in store.format.specs(1))
        self.capacity = min(num_bytes // row_bytes, num_rows)
        self._store = store
        self._copies = store.format.empty(self.capacity)
        self._place_of = np.zeros(num_rows, np.int32)  # 1 + the place of a row's copy; 0: it has none
        self._free = np.arange(self.capacity, dtype=np.int32)  # the first `room` of them
        self.room = self.capacity

    def without_copy(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Those of `rows` that have no copy yet."""
        has_none: NDArray[np.bool_] = self._place_of[rows] == 0
        return rows[has_none]

    def add(self, rows: NDArray[np.int64]) -> None:
        """Copy `rows`, at most `room`, which have no copy yet."""
        assert rows.size <= self.room, (rows.size, self.room)
        self.room -= rows.size
        places = self._free[self.room : self.room + rows.size]
        self._store.copy_to(rows, self._copies, places.astype(np.int64))
        self._place_of[rows] = places + 1

    def take_into(self, target: RowState, local: slice) -> None:
        """Move the copies of the rows `local` to their places in `target`, which holds the rows `local`."""
        place_of = self._place_of[local]
        at = np.flatnonzero(place_of)
        places = place_of[at].astype(np.int64) - 1
        copies = self._copies
        copy_rows((copies.weight, copies.state), places, (target.weight, target.state), at)
        target.last_step[at] = copies.last_step[places]
        self._free[self.room : self.room + at.size] = places
        self.room += at.size
        place_of[at] = 0
