"""Bytes per step: sums by hand, and a ring that is walked through."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tiny_shapes import tiny_shapes

from engram_megatron.config import ParallelConfig, RunConfig
from engram_megatron.model.counts import count_parameters
from engram_megatron.model.traffic import expected_unique_ratio, rank_traffic

TOKENS = 16 * 256  # per step of `tiny_shapes`


def _tiny(**parallel: int) -> RunConfig:
    tiny = tiny_shapes()
    return replace(tiny, parallel=ParallelConfig(**parallel), training=replace(tiny.training, micro_batch_size=1))


def _ring_all_reduce_bytes(size: int, ranks: int) -> int:
    """Bytes that one rank sends when `size` bytes are reduced and gathered chunk by chunk."""
    chunk, sent = size // ranks, 0
    for _phase in ("reduce-scatter", "all-gather"):
        for _hop in range(ranks - 1):
            sent += chunk
    return sent


def test_one_rank_sends_nothing() -> None:
    assert rank_traffic(_tiny(), 1, 0).total == 0


@pytest.mark.parametrize("ranks", [2, 4])
def test_gradients_travel_once_around_a_ring_twice(ranks: int) -> None:
    tiny = _tiny()
    counts = count_parameters(tiny)
    experts = counts.by_part["routed experts"]
    traffic = rank_traffic(tiny, ranks, 0)
    dense = counts.stored - counts.engram_tables - experts
    # the last chunk of a tensor may be shorter: a few bytes for each of 220 tensors
    assert traffic.dense_gradients == pytest.approx(_ring_all_reduce_bytes(4 * dense, ranks), abs=1000)
    assert traffic.expert_gradients == pytest.approx(_ring_all_reduce_bytes(4 * experts, ranks), abs=1000)


def test_expert_gradients_stay_within_the_ranks_that_hold_the_same_experts() -> None:
    assert rank_traffic(_tiny(expert=4), 4, 0).expert_gradients == 0
    experts = count_parameters(_tiny()).by_part["routed experts"]
    assert rank_traffic(_tiny(expert=2), 4, 0).expert_gradients == _ring_all_reduce_bytes(4 * experts // 2, 2)


def test_expert_all_to_all_moves_every_copy_there_and_back_twice() -> None:
    copies = TOKENS // 2 * 4 * 3  # tokens of a rank, top_k, expert layers
    away = copies // 2  # even routing: half of the copies belong to the other rank
    assert rank_traffic(_tiny(expert=2), 2, 0).expert_all_to_all == 4 * away * 128 * 4


def test_table_rows_are_asked_for_by_stages_with_engram_layers_only() -> None:
    memory_bytes = 128 * 4
    both_layers = rank_traffic(_tiny(), 2, 0)
    assert both_layers.table_rows == TOKENS // 2 * 2 * memory_bytes // 2  # half of the rows are at home
    assert both_layers.table_gradients == both_layers.table_rows
    stages = [rank_traffic(_tiny(pipeline=4), 4, stage).table_rows for stage in range(4)]
    assert stages == [0, TOKENS * memory_bytes * 3 // 4, TOKENS * memory_bytes * 3 // 4, 0]
    # a tensor group asks for each row once
    assert rank_traffic(_tiny(tensor=2), 2, 0).table_rows == TOKENS // 2 * 2 * memory_bytes // 2


def test_pipeline_carries_all_residual_streams_both_ways() -> None:
    streams = TOKENS * 4 * 128 * 4
    assert [rank_traffic(_tiny(pipeline=4), 4, stage).pipeline for stage in range(4)] == [
        streams,
        2 * streams,
        2 * streams,
        streams,
    ]


def test_tensor_parallel_collectives_are_counted_per_pair() -> None:
    shard = TOKENS // 2 * 128 * 4
    collectives = 5 * 2 * 4 + 2 + 3  # two pairs in each of four layers, embedding, head
    assert rank_traffic(_tiny(tensor=2), 2, 0).tensor_parallel == collectives * shard


def test_context_ring_passes_keys_and_values() -> None:
    keys_values = 4 * (48 + 32) * 4 * 4  # heads * channels * float32 * layers
    assert rank_traffic(_tiny(context=2), 2, 0).context == 3 * (TOKENS // 2) * keys_values


def test_expected_unique_ratio_meets_the_measurements_and_falls_between_them() -> None:
    assert expected_unique_ratio(64_000) == pytest.approx(0.47)
    assert expected_unique_ratio(100) == 0.49
    assert expected_unique_ratio(10**9) == pytest.approx(0.21)
    assert 0.33 < expected_unique_ratio(600_000) < 0.42


def test_copies_of_the_embedding_exchange_their_gradient_once() -> None:
    tiny = replace(tiny_shapes(), parallel=ParallelConfig(pipeline=4))
    config = replace(tiny, model=replace(tiny.model, mtp=replace(tiny.model.mtp, num_layers=1)))
    more = [rank_traffic(config, 4, stage).pipeline - rank_traffic(tiny, 4, stage).pipeline for stage in range(4)]
    assert more == [4096 * 128 * 4, 0, 0, 4096 * 128 * 4]
