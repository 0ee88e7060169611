"""The one place that says which layouts this version trains."""

from __future__ import annotations

from engram_megatron.config import RunConfig
from engram_megatron.errors import UsageError


def check_layout_is_supported(config: RunConfig, world_size: int) -> None:
    """Raise `UsageError` where the layout does not divide over `world_size` ranks, or is not trained yet."""
    if world_size < 1:
        raise UsageError(f"number of ranks = {world_size} must be at least 1")
    config.validate_layout(world_size)
    for name in ("pipeline", "context"):
        size = getattr(config.parallel, name)
        if size != 1:
            raise UsageError(
                f"parallel.{name} = {size}: this version trains with data, tensor and expert parallelism only; set "
                f"parallel.{name}=1 (--dry-run plans any layout)"
            )
