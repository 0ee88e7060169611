"""The lookup of one batch: shapes, gradients, repeatability, and the refusal of damaged requests.

The comparison over several ranks and steps is in test_against_dense_adam.py.
"""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from ranks import run_ranks

from engram_megatron.gather.lookup import RowLookup, UniqueRows
from engram_megatron.gather.transport import LoopbackTransport, TransportError, all_ranks_transport
from engram_megatron.tables.row_layout import RowLayout
from engram_megatron.tables.table_shard import TableShard


def _lookup(num_rows: int = 500, dim: int = 8, dtype: str = "float32") -> RowLookup:
    layout = RowLayout(num_rows, 16, 1)
    shard = TableShard(layout, 0, dim, dtype)
    shard.initialize(seed=1, std=1.0)
    return RowLookup(shard, layout, LoopbackTransport())


def _fetch(lookup: RowLookup, ids: NDArray[np.int64]) -> UniqueRows:
    return lookup.start(ids).wait()


def test_expand_gives_the_rows_of_the_ids_at_any_index() -> None:
    lookup = _lookup()
    ids = np.random.default_rng(0).integers(0, 500, (3, 2, 4, 5))
    rows = _fetch(lookup, ids)
    assert rows.values.is_leaf
    assert rows.values.requires_grad
    for index in (..., 1, slice(1, 3), (2, 1), (..., 0)):
        expanded = rows.expand(index)
        assert expanded.shape == (*ids[index].shape, 8)
        np.testing.assert_array_equal(expanded.detach().numpy(), lookup.shard.weight[ids[index]])


def test_batch_without_ids_has_no_rows_and_no_gradients() -> None:
    lookup = _lookup()
    rows = _fetch(lookup, np.empty((0, 2, 3), np.int64))
    assert rows.expand().shape == (0, 2, 3, 8)
    gradients = lookup.return_gradients(rows)
    assert gradients.local_rows.shape == (0,)
    assert gradients.gradients.shape == (0, 8)


def test_rows_that_no_loss_depends_on_come_home_with_zero_gradients() -> None:
    lookup = _lookup()
    gradients = lookup.return_gradients(_fetch(lookup, np.array([[7, 3], [7, 9]])))
    assert gradients.local_rows.tolist() == [3, 7, 9]
    assert (gradients.gradients == 0).all()


def test_gradient_is_the_derivative_of_the_loss() -> None:
    lookup = _lookup(num_rows=30, dim=3, dtype="float64")
    rows = _fetch(lookup, np.array([[1, 1, 4], [29, 4, 1]]))

    def two_microbatches(_values: torch.Tensor) -> torch.Tensor:
        return torch.tanh(rows.expand(0)).sum() + (rows.expand(1) ** 3 * torch.tensor([1.0, 2.0, 3.0])).sum()

    assert torch.autograd.gradcheck(two_microbatches, (rows.values,))


def test_gradients_of_many_repeats_are_bit_identical_on_several_threads() -> None:
    """Float addition does not commute with rounding: a sum in another order would show in the last bits."""
    lookup = _lookup(num_rows=2000, dim=16)
    rng = np.random.default_rng(0)
    ids = np.minimum(rng.zipf(1.3, (2, 20000)), 2000) - 1
    weights = torch.from_numpy(rng.standard_normal((20000, 16)).astype(np.float32))
    results = []
    threads = torch.get_num_threads()
    for number in (1, 2, 2, 2):
        torch.set_num_threads(number)
        rows = _fetch(lookup, ids)
        for microbatch in range(2):
            (rows.expand(microbatch) * weights).sum().backward()
        results.append(lookup.return_gradients(rows).gradients)
    torch.set_num_threads(threads)
    for other in results[1:]:
        np.testing.assert_array_equal(results[0], other)


class _FlipsOneBit(LoopbackTransport):
    """A network that damages one id."""

    def __init__(self, bit: int) -> None:
        self.bit = bit

    def exchange(
        self, rows: torch.Tensor, send_counts: NDArray[np.int64], receive_counts: NDArray[np.int64]
    ) -> torch.Tensor:
        received = rows.clone()
        if rows.dtype == torch.int64:
            received[2] ^= 1 << self.bit
        return received


@pytest.mark.parametrize("bit", [9, 40, 62])
def test_id_damaged_beyond_the_table_is_refused(bit: int) -> None:
    clean = _lookup()
    lookup = RowLookup(clean.shard, clean.layout, _FlipsOneBit(bit))
    with pytest.raises(TransportError, match=r"rank 0 was asked by rank 0 for row .*1 of 5 ids are wrong"):
        lookup.start(np.arange(5))


def _ask_with_another_layout(rank: int, world_size: int) -> str:
    layout = RowLayout(200, 16 if rank == 0 else 8, world_size)
    lookup = RowLookup(TableShard(layout, rank, 4), layout, all_ranks_transport(timeout_s=60))
    with pytest.raises(TransportError) as refusal:
        lookup.start(np.arange(8, 24))
    return str(refusal.value)


def test_ids_that_the_receiver_does_not_own_are_refused_and_name_their_source() -> None:
    # Rows 16..23 are rank 1's in blocks of 16 and rank 0's in blocks of 8: each rank asks the other one for them.
    for rank, message in enumerate(run_ranks(_ask_with_another_layout, 2)):
        source = 1 - rank
        assert message.startswith(
            f"rank {rank} was asked by rank {source} for row 16, which is none of its rows (8 of "
        )
