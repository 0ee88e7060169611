"""The lookup of one batch: shapes, gradients, repeatability, and the refusal of damaged requests.

The comparison over several ranks and steps is in test_against_dense_adam.py.
"""

import numpy as np
import pytest
import torch
from ranks import run_ranks
from sharded_tables import Tables, sharded_tables

from engram_megatron.errors import UsageError
from engram_megatron.gather.lookup import RowLookup
from engram_megatron.gather.transport import TransportError
from engram_megatron.tables.row_layout import RowLayout


def _lookup(num_rows: int = 500, dim: int = 8, dtype: str = "float32") -> RowLookup:
    return sharded_tables(Tables(rows=num_rows, row_dim=dim, dtype=dtype))[0]


def test_expand_gives_the_rows_of_the_ids_at_any_index() -> None:
    lookup = _lookup()
    ids = np.random.default_rng(0).integers(0, 500, (3, 2, 4, 5))
    rows = lookup.read(ids)
    for index in (..., 1, slice(1, 3), (2, 1), (..., 0)):
        expanded = rows.expand(index)
        assert expanded.shape == (*ids[index].shape, 8)
        np.testing.assert_array_equal(expanded.detach().numpy(), lookup.shard.rows.weight[ids[index]])


def test_batch_without_ids_has_no_rows_and_no_gradients() -> None:
    lookup = _lookup()
    rows = lookup.read(np.empty((0, 2, 3), np.int64))
    assert rows.expand().shape == (0, 2, 3, 8)
    gradients = lookup.return_gradients(rows)
    assert gradients.local_rows.shape == (0,)
    assert gradients.gradients.shape == (0, 8)


def test_rows_that_no_loss_depends_on_come_home_with_zero_gradients() -> None:
    lookup = _lookup()
    gradients = lookup.return_gradients(lookup.read(np.array([[7, 3], [7, 9]])))
    assert gradients.local_rows.tolist() == [3, 7, 9]
    assert (gradients.gradients == 0).all()


def test_gradient_is_the_derivative_of_the_loss() -> None:
    lookup = _lookup(num_rows=30, dim=3, dtype="float64")
    ids = torch.tensor([[1, 1, 4], [29, 4, 1]])
    rows = lookup.read(ids.numpy())
    table = torch.nn.Embedding(30, 3, _weight=torch.from_numpy(lookup.shard.rows.weight.copy()))

    def loss(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        return torch.tanh(first).sum() + (second**3 * torch.tensor([1.0, 2.0, 3.0])).sum()

    loss(rows.expand(0), rows.expand(1)).backward()
    loss(table(ids[0]), table(ids[1])).backward()
    gradients = lookup.return_gradients(rows)
    assert table.weight.grad is not None
    np.testing.assert_allclose(gradients.gradients, table.weight.grad[gradients.local_rows].numpy(), rtol=1e-14)


def test_bfloat16_rows_have_float32_gradients() -> None:
    """Their 3 * 256 addends of 1 / 256 would stop growing at 1 in bfloat16."""
    lookup = sharded_tables(Tables(rows=20, row_dim=4, dtype="bfloat16"))[0]
    rows = lookup.read(np.full((3, 256), 7))
    memory = torch.cat([rows.expand(i) for i in range(3)])
    assert memory.dtype == torch.bfloat16
    (memory.float() / 256).sum().backward()
    np.testing.assert_array_equal(lookup.return_gradients(rows).gradients, np.full((1, 4), 3.0, np.float32))


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
        rows = lookup.read(ids)
        for microbatch in range(2):
            (rows.expand(microbatch) * weights).sum().backward()
        results.append(lookup.return_gradients(rows).gradients)
    torch.set_num_threads(threads)
    for other in results[1:]:
        np.testing.assert_array_equal(results[0], other)


def _open_another_table(rank: int, world_size: int) -> str:
    with pytest.raises(UsageError) as refusal:
        sharded_tables(Tables(rows=200, row_dim=4, block_rows=16 if rank == 0 else 8), rank, world_size)
    return str(refusal.value)


def test_ranks_with_other_tables_are_refused_before_any_exchange() -> None:
    for message in run_ranks(_open_another_table, 2):
        assert message.startswith("rank 1 has other Engram tables than rank 0: 200 rows of 4 float32 numbers in blocks")


def _ask_with_another_layout(rank: int, world_size: int) -> str:
    lookup, _ = sharded_tables(Tables(rows=200, row_dim=4, block_rows=8), rank, world_size)
    if rank == 0:
        lookup.layout = RowLayout(200, 16, world_size, world_size)
    with pytest.raises(TransportError) as refusal:
        lookup.read(np.arange(8, 24))
    return str(refusal.value)


def test_ids_that_the_receiver_does_not_own_are_refused_and_name_their_source() -> None:
    # Rows 16..23 are rank 1's in blocks of 16 and rank 0's in blocks of 8: each rank asks the other one for them.
    for rank, message in enumerate(run_ranks(_ask_with_another_layout, 2)):
        source = 1 - rank
        assert message.startswith(
            f"rank {rank} was asked by rank {source} for row 16, which is none of its rows (8 of "
        )
