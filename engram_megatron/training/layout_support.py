"""The one place that says which layouts this version trains."""

from __future__ import annotations

from engram_megatron.config import RunConfig
from engram_megatron.errors import UsageError


def check_layout_is_supported(config: RunConfig, world_size: int) -> None:
    """Raise `UsageError` where the layout does not divide over `world_size` ranks, or is not trained yet."""
    if world_size < 1:
        raise UsageError(f"number of ranks = {world_size} must be at least 1")
    config.validate_layout(world_size)
    not_yet = {
        f"training.recompute = {config.training.recompute}": config.training.recompute != "none",
        f"model.mtp.num_layers = {config.model.mtp.num_layers}": config.model.mtp.num_layers != 0,
    }
    for setting, chosen in not_yet.items():
        if chosen:
            raise UsageError(f"{setting}: this version does not train with it yet (--dry-run plans any layout)")
