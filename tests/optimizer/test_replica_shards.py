"""The two all-to-alls between flat shards and owners, on buckets whose cuts, padding and owners are awkward."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ranks import run_ranks

# (bucket length, places): start, end, owner. Three replicas.
CASES = {
    "over all shards, one owner": (30, [(0, 30, 1)]),
    "one owner each, at the cuts": (30, [(0, 10, 0), (10, 20, 1), (20, 30, 2)]),
    "one owner each, all moved": (30, [(0, 10, 2), (10, 20, 0), (20, 30, 1)]),
    "padding at cuts and ends": (30, [(3, 9, 2), (12, 18, 0), (19, 24, 2)]),
    "an idle replica": (30, [(0, 4, 0), (4, 13, 2), (13, 14, 0), (15, 29, 2)]),
    "single elements": (6, [(i, i + 1, (5 * i + 1) % 3) for i in range(6)]),
}


def _exchange(rank: int, world_size: int) -> dict[str, tuple[bool, bool, int]]:
    """Per case: whether the owner got the sums, whether the shard got the weights, elements sent to others."""
    import torch
    import torch.distributed as dist

    from engram_megatron.optimizer.replica_shards import BucketExchange, Place

    send, sent_away = dist.all_to_all_single, [0]

    def counted(received: Any, sent: Any, to_receive: list[int], to_send: list[int], **kwargs: Any) -> Any:
        sent_away[0] += sum(to_send) - to_send[rank]
        return send(received, sent, to_receive, to_send, **kwargs)

    dist.all_to_all_single = counted
    results = {}
    for name, (length, spans) in CASES.items():
        shard = slice(rank * length // 3, (rank + 1) * length // 3)
        sums, weights = (torch.full((length,), torch.nan, dtype=torch.float64) for _ in range(2))
        sums[shard] = torch.arange(length, dtype=torch.float64)[shard]  # as a reduce-scatter leaves it
        places = [Place(*span) for span in spans]
        exchange = BucketExchange(SimpleNamespace(grad_data=sums, param_data=weights), dist.group.WORLD, places)
        sent_away[0] = 0
        gradients = exchange.collect_gradients()
        mine = [place for place in places if place.owner == rank]
        got = [gradient.tolist() for gradient in gradients] == [list(range(p.start, p.end)) for p in mine]
        for place in mine:
            weights[place.start : place.end] = torch.arange(place.start, place.end, dtype=torch.float64) ** 2
        away = sent_away[0]
        exchange.return_weights()
        covered = torch.zeros(length, dtype=torch.bool)
        for place in places:
            covered[place.start : place.end] = True
        held = covered[shard]
        expected = (torch.arange(length, dtype=torch.float64) ** 2)[shard]
        results[name] = (got, bool((weights[shard] == expected)[held].all()), away)
    return results


@pytest.fixture(scope="module")
def exchanged() -> list[dict[str, tuple[bool, bool, int]]]:
    return run_ranks(_exchange, 3)


@pytest.mark.parametrize("case", CASES)
def test_sums_reach_their_owners_and_weights_come_back(case: str, exchanged: list[Any]) -> None:
    assert [rank[case][:2] for rank in exchanged] == [(True, True)] * 3


@pytest.mark.parametrize("case", CASES)
def test_only_elements_that_another_replica_owns_are_sent(case: str, exchanged: list[Any]) -> None:
    length, spans = CASES[case]
    owner = np.full(length, -1)
    for start, end, of in spans:
        owner[start:end] = of
    for rank, (first, end) in enumerate(pairwise([0, length // 3, 2 * length // 3, length])):
        away = owner[first:end]
        assert exchanged[rank][case][2] == ((away >= 0) & (away != rank)).sum()
