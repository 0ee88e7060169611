"""What every transport must deliver, in pieces of all kinds of sizes, dtypes and shapes."""

import numpy as np
import torch

from engram_megatron.gather.transport import Transport, UncheckedTransport


def _count(source: int, destination: int) -> int:
    """Rows from one rank to another: many zeros among them, rank 1 sends nothing, rank 2 receives nothing."""
    return 0 if source == 1 or destination == 2 else (source + 2 * destination + 1) % 3


def check_deliveries(transport: Transport) -> None:
    """Collective; assertions hold on every rank of `transport`."""
    me, size = transport.rank, transport.size
    counts = np.array([_count(me, r) for r in range(size)], np.int64)
    expected_counts = np.array([_count(r, me) for r in range(size)], np.int64)
    one_each = np.ones(size, np.int64)
    told = transport.exchange(torch.from_numpy(counts), one_each, one_each, what="counts").numpy()
    np.testing.assert_array_equal(told, expected_counts)
    _check_values(transport, counts, expected_counts)
    _check_shapes(transport, counts, expected_counts)
    _check_large_and_uneven(transport)
    nothing = np.zeros(size, np.int64)
    assert list(transport.exchange(torch.empty(0, 5), nothing, nothing).shape) == [0, 5]


def _check_values(transport: Transport, counts: np.ndarray, expected_counts: np.ndarray) -> None:
    me, size = transport.rank, transport.size
    sent = [[me, r, i] for r in range(size) for i in range(counts[r])]
    expected = [[r, me, i] for r in range(size) for i in range(expected_counts[r])]
    rows = torch.tensor(sent, dtype=torch.float64).reshape(-1, 3)
    received = transport.exchange(rows, counts, expected_counts)
    assert received.tolist() == expected
    out = torch.full((len(expected), 3), torch.nan, dtype=torch.float64)
    assert transport.exchange(rows, counts, expected_counts, out=out) is out
    assert out.tolist() == expected
    ids = transport.exchange(rows[:, 2].to(torch.int64), counts, expected_counts, what="row ids")
    assert ids.tolist() == [row[2] for row in expected]


def _check_shapes(transport: Transport, counts: np.ndarray, expected_counts: np.ndarray) -> None:
    for dtype in (torch.bfloat16, torch.float32, torch.uint8):
        for shape in ((), (1,), (3,), (2, 5)):
            rows = torch.full((int(counts.sum()), *shape), 7, dtype=dtype)
            received = transport.exchange(rows, counts, expected_counts)
            assert received.dtype == dtype
            assert list(received.shape) == [int(expected_counts.sum()), *shape]
            assert bool((received == 7).all())
    every_other = torch.arange(2 * int(counts.sum()), dtype=torch.int32)[::2]
    received = transport.exchange(every_other, counts, expected_counts)
    assert bool((received % 2 == 0).all())


def _check_large_and_uneven(transport: Transport) -> None:
    """Megabytes with odd borders: rank s sends 300,001 + s + d bytes to rank d."""
    me, ranks = transport.rank, np.arange(transport.size)
    send, receive = (300_001 + me + ranks, 300_001 + ranks + me)

    def piece(source: int, destination: int) -> np.ndarray:
        draw = np.random.default_rng([source, destination])
        return draw.integers(0, 256, 300_001 + source + destination, dtype=np.uint8)

    rows = torch.from_numpy(np.concatenate([piece(me, r) for r in ranks]))
    received = transport.exchange(rows, send, receive, what="gradients")
    np.testing.assert_array_equal(received.numpy(), np.concatenate([piece(r, me) for r in ranks]))


def check_numbers(transport: UncheckedTransport) -> None:
    """Collective. Numbers arrive beside an exchange, before or after it."""
    me, ranks = transport.rank, np.arange(transport.size)
    wait = transport.start_numbers(100 * me + ranks)
    one_each = np.ones(transport.size, np.int64)
    received = transport.exchange(torch.full((transport.size, 3), me), one_each, one_each)
    assert received[:, 0].tolist() == ranks.tolist()
    assert wait().tolist() == (100 * ranks + me).tolist()
