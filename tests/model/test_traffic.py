"""Bytes per step: sums by hand, and a ring that is walked through. `test_traffic_measured` compares whole steps."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from tiny_shapes import tiny_shapes

from engram_megatron.config import ParallelConfig, RunConfig
from engram_megatron.model.counts import count_parameters
from engram_megatron.model.traffic import expected_unique_ratio, rank_traffic
from engram_megatron.overrides import apply_overrides
from engram_megatron.training.plan_layout import takes_muon

TOKENS = 16 * 256  # per step of `tiny_shapes`


def _tiny(**parallel: int) -> RunConfig:
    tiny = tiny_shapes()
    return replace(tiny, parallel=ParallelConfig(**parallel), training=replace(tiny.training, micro_batch_size=1))


def _sent(config: RunConfig, world_size: int, pipeline_rank: int = 0) -> Counter[str]:
    """Bytes by purpose."""
    sent: Counter[str] = Counter()
    for transfer in rank_traffic(config, world_size, pipeline_rank, takes_muon(config)):
        sent[transfer.purpose] += transfer.bytes
    return sent


def _ring_all_reduce_bytes(size: int, ranks: int) -> int:
    """Bytes that one rank sends when `size` bytes are reduced and gathered chunk by chunk."""
    chunk, sent = size // ranks, 0
    for _phase in ("reduce-scatter", "all-gather"):
        for _hop in range(ranks - 1):
            sent += chunk
    return sent


def test_one_rank_sends_nothing() -> None:
    assert _sent(_tiny(), 1).total() == 0


@pytest.mark.parametrize("ranks", [2, 4])
def test_gradients_travel_once_around_a_ring_twice(ranks: int) -> None:
    tiny = _tiny()
    counts = count_parameters(tiny)
    experts = counts.by_part["routed experts"]
    sent = _sent(tiny, ranks)
    dense = counts.stored - counts.engram_tables - experts
    # the last chunk of a tensor may be shorter: a few bytes for each of 220 tensors
    assert sent["gradients, dense"] == pytest.approx(_ring_all_reduce_bytes(4 * dense, ranks), abs=1000)
    assert sent["gradients, routed experts"] == pytest.approx(_ring_all_reduce_bytes(4 * experts, ranks), abs=1000)


def test_expert_gradients_stay_within_the_ranks_that_hold_the_same_experts() -> None:
    assert _sent(_tiny(expert=4), 4)["gradients, routed experts"] == 0
    experts = count_parameters(_tiny()).by_part["routed experts"]
    assert _sent(_tiny(expert=2), 4)["gradients, routed experts"] == _ring_all_reduce_bytes(4 * experts // 2, 2)


def test_expert_all_to_all_moves_every_copy_there_and_back_twice() -> None:
    copies = TOKENS // 2 * 4 * 3  # tokens of a rank, top_k, expert layers
    away = copies // 2  # even routing: half of the copies belong to the other rank
    hidden, probability = 128 * 4, 4
    there_and_back = 2 * hidden + probability
    kind = "expert all-to-all (even routing)"
    assert _sent(_tiny(expert=2), 2)[kind] == 2 * away * there_and_back
    again = apply_overrides(
        _tiny(expert=2), ["training.recompute=selective", "training.recompute_modules=feed_forward"]
    )
    assert _sent(again, 2)[kind] == 3 * away * there_and_back


def test_tables_serve_from_every_rank_and_ask_from_pipeline_ranks_with_engram_layers_only() -> None:
    memory_bytes, heads = 128 * 4, 8
    both_layers = _sent(_tiny(), 2)
    assert both_layers["table gradients (upper bound)"] == TOKENS // 2 * 2 * memory_bytes // 2  # half is at home
    assert both_layers["table rows (upper bound)"] == both_layers["table gradients (upper bound)"]
    assert both_layers["table row ids (upper bound)"] == (TOKENS // 2 * 2 * heads + 2 * 7) * 8 // 2
    ranks = [_sent(_tiny(pipeline=4), 4, rank) for rank in range(4)]
    asked = TOKENS * memory_bytes * 3 // 4
    assert [sent["table gradients (upper bound)"] for sent in ranks] == [0, asked, asked, 0]
    assert [sent["table rows (upper bound)"] for sent in ranks] == [asked // 2] * 4
    # a tensor group asks for each row once
    assert _sent(_tiny(tensor=2), 2)["table gradients (upper bound)"] == TOKENS // 2 * 2 * memory_bytes // 2


def test_pipeline_carries_all_residual_streams_both_ways() -> None:
    kind, streams = "residual streams between pipeline ranks", TOKENS * 4 * 128 * 4
    assert [_sent(_tiny(pipeline=4), 4, rank)[kind] for rank in range(4)] == [
        streams,
        2 * streams,
        2 * streams,
        streams,
    ]
    # two chunks each: three borders, the second of which leads from the last rank to the first
    assert [_sent(_tiny(pipeline=2, virtual_pipeline=2), 2, rank)[kind] for rank in range(2)] == [3 * streams] * 2


def test_full_recomputation_repeats_what_the_forward_pass_of_layers_exchanges() -> None:
    """Not the embedding's, the head's and the loss's."""
    kind = "activations over tensor ranks"
    config = _tiny(tensor=2)
    again = apply_overrides(config, ["training.recompute=full"])
    attention = 128 + 128 + 48 + 32 + 16 + 128  # queries, latents, their width, their up-projection, rope key, output
    per_layer = attention + 2 * 128  # dense, or shared experts
    whole = _sent(again, 2)[kind] - _sent(config, 2)[kind]
    assert whole == 4 * per_layer * TOKENS * 4 // 2


def test_context_ranks_gather_latents() -> None:
    latents = (32 + 16) * 4 * 4  # float32, layers
    sent = _sent(_tiny(context=2), 2)["latent keys and values over context ranks"]
    assert sent == 2 * latents * TOKENS // 2  # forward and backward, half of the sequence is at home


def test_distributed_optimizer_scatters_sums_and_gathers_weights() -> None:
    config = apply_overrides(_tiny(expert=2), ["parallel.distributed_optimizer=true"])
    counts = count_parameters(config)
    sent = _sent(config, 4)
    experts = counts.by_part["routed experts"] // 2
    assert sent["gradients, routed experts"] == sent["weights, routed experts"] == 4 * experts // 2
    dense = 4 * (counts.stored - counts.engram_tables - 2 * experts) * 3 // 4
    # tensors begin at multiples of 64 elements; there are some 100 of them
    assert sent["gradients, dense"] == pytest.approx(dense, abs=100 * 64 * 4)
    assert sent["gradients, dense"] >= dense


def test_multi_token_prediction_sums_the_gradients_of_two_embeddings() -> None:
    config = apply_overrides(_tiny(pipeline=2), ["model.mtp.num_layers=1"])
    sent = [_sent(config, 2, rank)["gradients, both embeddings"] for rank in range(2)]
    assert sent == [4096 * 128 * 4] * 2


def test_expected_unique_ratio_meets_the_measurements_and_falls_between_them() -> None:
    assert expected_unique_ratio(64_000) == pytest.approx(0.47)
    assert expected_unique_ratio(100) == 0.49
    assert expected_unique_ratio(10**9) == pytest.approx(0.21)
    assert 0.33 < expected_unique_ratio(600_000) < 0.42
