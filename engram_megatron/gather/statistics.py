"""What a step's gather moved, counted on one rank."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class GatherStatistics:
    """Lookups and wire bytes of one gather on one rank. What a rank owns itself does not cross the wire."""

    lookups: int  # ids in the batch, repeats counted
    unique_rows: int
    id_bytes_sent: int
    id_bytes_received: int
    row_bytes_sent: int
    row_bytes_received: int

    @property
    def unique_ratio(self) -> float:
        """Distinct rows per lookup; 1 where nothing was looked up."""
        return self.unique_rows / self.lookups if self.lookups else 1.0

    @property
    def gradient_bytes_sent(self) -> int:
        """Gradients take the way of the rows back."""
        return self.row_bytes_received

    @property
    def gradient_bytes_received(self) -> int:
        return self.row_bytes_sent

    def scalars(self) -> dict[str, float]:
        """The panel `gather/` of TensorBoard."""
        return {
            "gather/lookups": float(self.lookups),
            "gather/unique_rows": float(self.unique_rows),
            "gather/unique_ratio": self.unique_ratio,
            "gather/id_bytes_sent": float(self.id_bytes_sent),
            "gather/id_bytes_received": float(self.id_bytes_received),
            "gather/row_bytes_sent": float(self.row_bytes_sent),
            "gather/row_bytes_received": float(self.row_bytes_received),
            "gather/gradient_bytes_sent": float(self.gradient_bytes_sent),
            "gather/gradient_bytes_received": float(self.gradient_bytes_received),
        }
