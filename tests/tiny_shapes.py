"""`engram_tiny` with the batch that sums by hand count on, whatever the preset trains with."""

from __future__ import annotations

from dataclasses import replace

from engram_megatron.config import RunConfig
from engram_megatron.presets import engram_tiny


def tiny_shapes() -> RunConfig:
    """Sequences of 256 tokens, 16 in a step, 4 in a microbatch."""
    tiny = engram_tiny()
    return replace(
        tiny,
        data=replace(tiny.data, sequence_length=256),
        training=replace(tiny.training, global_batch_size=16, micro_batch_size=4),
    )
