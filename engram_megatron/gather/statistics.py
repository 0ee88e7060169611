"""What a step's gather moved, counted on one rank."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass


@dataclass(frozen=True, kw_only=True)
class GatherStatistics:
    """Lookups and bytes of one gather on one rank. Bytes sent and received cross the network between nodes; what a
    node owns itself is read from its shared memory."""

    lookups: int  # ids in the batch, repeats counted
    unique_rows: int
    id_bytes_sent: int
    id_bytes_received: int
    row_bytes_sent: int
    row_bytes_received: int
    gradient_bytes_sent: int
    gradient_bytes_received: int
    node_row_bytes: int  # rows of this rank's batch that its node owns
    hottest_lookups: int  # of the hundredth of the batch's distinct rows that it looks up most often

    @property
    def unique_ratio(self) -> float:
        """Distinct rows per lookup; 1 where nothing was looked up."""
        return self.unique_rows / self.lookups if self.lookups else 1.0

    def scalars(self) -> dict[str, float]:
        """The panel `gather/` of TensorBoard."""
        counts = {f"gather/{name}": float(value) for name, value in asdict(self).items()}
        return counts | {"gather/unique_ratio": self.unique_ratio}


def collision_estimate(touched_share: float) -> float:
    """Share of the n-grams seen so far that share their row with another one, if `touched_share` of all rows were hit.

    k n-grams that fall on p rows at random leave (1 - 1/p)^k of them free, about exp(-k/p); what is not free is hit by
    one n-gram each plus the collisions. All rows hit: 1, k is unknown.
    """
    if touched_share >= 1.0:
        return 1.0
    ngrams_per_row = -math.log1p(-touched_share)
    return 1.0 - touched_share / ngrams_per_row if ngrams_per_row > 0 else 0.0
