"""What a rank has to ask for: each distinct row of its batch once, grouped by owner."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engram_megatron.tables.row_layout import RowLayout


@dataclass(frozen=True, eq=False)
class GatherPlan:
    """The distinct rows behind an array of row ids.

    `unique_rows` int64 [U], sorted by owner, then by row id; `owner_counts` int64 [num_shards], how many of them each
    shard owns; `inverse` int64 with the shape of the ids, `unique_rows[inverse] == ids`.
    """

    unique_rows: NDArray[np.int64]
    owner_counts: NDArray[np.int64]
    inverse: NDArray[np.int64]


def make_plan(ids: NDArray[np.int64], layout: RowLayout) -> GatherPlan:
    """Plan the gather of `ids` (int64 row ids, any shape, may be empty)."""
    assert ids.dtype == np.int64, ids.dtype
    rows, inverse = np.unique(ids.reshape(-1), return_inverse=True)
    assert rows.size == 0 or (rows[0] >= 0 and rows[-1] < layout.total_rows), (rows[0], rows[-1], layout)
    owners = layout.owner(rows)
    by_owner = np.argsort(owners, kind="stable")  # rows rise already, and stay so within an owner
    place = np.empty_like(by_owner)
    place[by_owner] = np.arange(rows.size)
    counts = np.bincount(owners, minlength=layout.num_shards).astype(np.int64)
    return GatherPlan(rows[by_owner], counts, place[inverse].reshape(ids.shape))
