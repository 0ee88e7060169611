"""A wrong layout loses rows, or gives one row to two owners."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engram_megatron.errors import UsageError
from engram_megatron.tables.row_layout import RowLayout

layouts = st.builds(
    lambda total_rows, block_rows, nodes, shards_per_node: RowLayout(
        total_rows, block_rows, nodes * shards_per_node, nodes
    ),
    total_rows=st.integers(1, 3000),
    block_rows=st.integers(1, 200),
    nodes=st.integers(1, 4),
    shards_per_node=st.integers(1, 4),
)


@settings(deadline=None)
@given(layouts)
def test_every_row_has_one_place_and_every_place_one_row(layout: RowLayout) -> None:
    rows = np.arange(layout.total_rows)
    owner, local = layout.owner(rows), layout.local_index(rows)
    for shard in range(layout.num_shards):
        places = local[owner == shard]
        assert sorted(places) == list(range(layout.num_local_rows(shard)))
        np.testing.assert_array_equal(layout.global_row(shard, places), rows[owner == shard])
    assert sum(map(layout.num_local_rows, range(layout.num_shards))) == layout.total_rows


@settings(deadline=None)
@given(layouts)
def test_blocks_list_a_shard_in_its_local_order(layout: RowLayout) -> None:
    numbers = []
    for shard in range(layout.num_shards):
        stored = [np.arange(block.start, block.stop) for block in layout.blocks(shard)]
        local_rows = np.concatenate([[], *stored]).astype(np.int64)
        everything = np.arange(layout.num_local_rows(shard))
        np.testing.assert_array_equal(local_rows, layout.global_row(shard, everything))
        for block in layout.blocks(shard):
            np.testing.assert_array_equal(layout.global_row(shard, everything[block.local]), stored.pop(0))
            numbers.append(block.number)
    assert sorted(numbers) == list(range(layout.num_blocks))


@settings(deadline=None)
@given(layouts)
def test_no_shard_is_more_than_one_block_larger_and_shard_0_is_the_largest(layout: RowLayout) -> None:
    sizes = [layout.num_local_rows(shard) for shard in range(layout.num_shards)]
    assert max(sizes) == sizes[0]
    assert max(sizes) - min(sizes) <= layout.block_rows


@settings(deadline=None)
@given(layouts)
def test_no_node_is_more_than_one_block_larger_than_another(layout: RowLayout) -> None:
    blocks = [layout.num_local_blocks(shard) for shard in range(layout.num_shards)]
    size = layout.shards_per_node
    of_nodes = [sum(blocks[first : first + size]) for first in range(0, layout.num_shards, size)]
    assert max(of_nodes) - min(of_nodes) <= 1


def test_nodes_of_different_sizes_are_refused() -> None:
    with pytest.raises(UsageError, match="7 ranks are not divisible by 2 nodes"):
        RowLayout(100, 10, 7, 2)


def test_ids_of_any_shape_and_beyond_int32_are_placed() -> None:
    layout = RowLayout(total_rows=5_000_000_000, block_rows=4096, num_shards=7)
    rows = np.array([[0, 4096], [4_294_967_296, 4_999_999_999]])
    owner, local = layout.owner(rows), layout.local_index(rows)
    for place in np.ndindex(rows.shape):
        assert layout.global_row(int(owner[place]), local[place]) == rows[place]


@pytest.mark.parametrize("sizes", [(0, 1, 1), (1, 0, 1), (1, 1, 0)])
def test_sizes_below_one_are_refused(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(UsageError, match="must be at least 1"):
        RowLayout(*sizes)
