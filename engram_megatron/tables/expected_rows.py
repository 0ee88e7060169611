"""How many rows a run can update, from its config alone."""

from __future__ import annotations

from engram_megatron.config import RunConfig
from engram_megatron.tables.row_layout import RowLayout


def expected_touched_rows(config: RunConfig, layout: RowLayout) -> int:
    """Rows of one shard that the steps of a run update, at most: as if no n-gram came twice."""
    assert config.engram is not None
    training = config.training
    tokens = training.num_steps * training.global_batch_size * config.data.sequence_length
    lookups = tokens * len(config.engram.layer_numbers) * config.engram.num_heads
    # The dealing of blocks spreads them over shards evenly, but for a tenth.
    return min(layout.num_local_rows(0), int(1.1 * lookups / layout.num_shards) + 1)
