"""The one place that says which layouts train. The rules themselves stand in `RunConfig.validate_layout`."""

from __future__ import annotations

from engram_megatron.config import RunConfig
from engram_megatron.errors import UsageError
from engram_megatron.model.pipeline_layout import pipeline_layout


def check_layout_is_supported(config: RunConfig, world_size: int) -> None:
    """Raise `UsageError` where the layout does not divide over `world_size` ranks."""
    if world_size < 1:
        raise UsageError(f"number of ranks = {world_size} must be at least 1")
    config.validate_layout(world_size)
    pipeline_layout(config)
