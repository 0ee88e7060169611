"""What one step's backward says about a shard's rows; made by the gather, consumed by the optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class RowGradients:
    """Gradients of the rows of one shard that any rank used in a step, each summed over all ranks.

    `local_rows` int64 [n], strictly rising; `gradients` [n, row_dim] in the dtype of the table.
    """

    local_rows: NDArray[np.int64]
    gradients: NDArray[Any]
