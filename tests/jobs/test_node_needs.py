"""Needs of a node against sums that the tables and the plan make in other ways."""

from __future__ import annotations

from dataclasses import replace

import pytest

from engram_megatron.errors import UsageError
from engram_megatron.jobs.node_needs import node_needs
from engram_megatron.model.counts import table_rows
from engram_megatron.overrides import apply_overrides
from engram_megatron.presets import engram_tiny, preset

GIB = 1024**3


def test_tables_of_a_large_run_are_dealt_over_its_nodes() -> None:
    config = apply_overrides(preset("engram_27b"), ["parallel.expert=5", "parallel.pipeline=4"])
    needs = node_needs(config, 10, 8)
    assert config.engram is not None
    whole = table_rows(config.engram) * (config.engram.row_dim * 4 * 3 + 4)  # float32 weight, two moments, last step
    assert whole <= 10 * needs.table_bytes < 1.02 * whole
    assert needs.shm_bytes_with_gpus == GIB  # what NVIDIA asks for
    assert node_needs(config, 20, 8).table_bytes < 0.51 * needs.table_bytes


def test_lazy_tables_need_what_the_steps_can_touch() -> None:
    short = apply_overrides(engram_tiny(), ["training.num_steps=1", "engram.rows_per_head=500000"])
    lazy = replace(short, tables=replace(short.tables, commit="lazy"))
    eager_bytes, lazy_bytes = (node_needs(config, 1, 2).table_bytes for config in (short, lazy))
    assert short.engram is not None
    lookups = short.training.global_batch_size * short.data.sequence_length
    lookups *= len(short.engram.layer_numbers) * short.engram.num_heads
    assert lookups * short.engram.row_dim * 12 < lazy_bytes < eager_bytes / 2


def test_layout_that_does_not_fit_is_refused() -> None:
    with pytest.raises(UsageError, match="global_batch_size"):
        node_needs(engram_tiny(), 3, 1)
