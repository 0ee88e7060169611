"""A wrong plan fetches rows twice, from the wrong owner, or puts them in the wrong places."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from engram_megatron.gather.plan import make_plan
from engram_megatron.tables.row_layout import RowLayout


@settings(deadline=None)
@given(
    ids=st.lists(st.integers(0, 499), max_size=120),
    block_rows=st.integers(1, 60),
    num_shards=st.integers(1, 6),
)
def test_plan_asks_each_owner_for_each_row_once(ids: list[int], block_rows: int, num_shards: int) -> None:
    layout = RowLayout(500, block_rows, num_shards)
    ids_array = np.array(ids, np.int64)
    plan = make_plan(ids_array, layout)
    np.testing.assert_array_equal(plan.unique_rows[plan.inverse], ids_array)
    by_owner = np.split(plan.unique_rows, np.cumsum(plan.owner_counts)[:-1])
    assert len(by_owner) == num_shards
    for owner, rows in enumerate(by_owner):
        assert rows.tolist() == sorted({i for i in ids if layout.owner(np.array(i)) == owner})


def test_plan_keeps_the_shape_of_the_ids() -> None:
    layout = RowLayout(500, 16, 3)
    assert make_plan(np.zeros((2, 3, 4), np.int64), layout).inverse.shape == (2, 3, 4)
    nothing = make_plan(np.zeros((0, 3, 4), np.int64), layout)
    assert nothing.inverse.shape == (0, 3, 4)
    assert nothing.owner_counts.tolist() == [0, 0, 0]
