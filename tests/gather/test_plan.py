"""A wrong plan fetches rows twice, from the wrong owner, too late, or puts them in the wrong places."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from engram_megatron.gather.plan import make_plan, merge_requests
from engram_megatron.tables.row_layout import RowLayout

IDS = st.lists(st.integers(0, 499), max_size=120)


@settings(deadline=None)
@given(
    ids=IDS,
    block_rows=st.integers(1, 60),
    nodes=st.integers(1, 3),
    ranks_per_node=st.integers(1, 3),
    waves=st.integers(1, 4),
)
def test_plan_has_each_row_once_by_owner_and_in_the_wave_that_needs_it_first(
    ids: list[int], block_rows: int, nodes: int, ranks_per_node: int, waves: int
) -> None:
    layout = RowLayout(500, block_rows, nodes * ranks_per_node, nodes)
    microbatches = np.array(ids[: len(ids) // 5 * 5], np.int64).reshape(5, -1)
    plan = make_plan(microbatches, layout, waves)
    np.testing.assert_array_equal(plan.unique_rows[plan.inverse], microbatches)
    assert len(set(plan.unique_rows.tolist())) == plan.unique_rows.size
    owners = layout.owner(plan.unique_rows)
    order = [
        (owner % ranks_per_node, owner // ranks_per_node, row)
        for owner, row in zip(owners, plan.unique_rows, strict=True)
    ]
    assert order == sorted(order)
    for rail in range(ranks_per_node):
        assert (owners[plan.of_rail(rail)] % ranks_per_node == rail).all()
    assert plan.rail_counts.sum() == plan.unique_rows.size
    for row, wave in zip(plan.unique_rows, plan.waves, strict=True):
        first_microbatch = min(i for i in range(5) if row in microbatches[i])
        assert wave == min(first_microbatch, waves - 1)


@settings(deadline=None)
@given(of_ranks=st.lists(IDS, min_size=1, max_size=3), nodes=st.integers(1, 3), waves=st.integers(1, 3))
def test_requests_of_a_node_have_each_row_once_and_say_where_it_arrives(
    of_ranks: list[list[int]], nodes: int, waves: int
) -> None:
    layout = RowLayout(500, 7, nodes, nodes)
    rows = [np.unique(np.array(ids, np.int64)) for ids in of_ranks]
    wave_of = [rows_of_rank * 31 % waves for rows_of_rank in rows]
    requests = merge_requests(rows, wave_of, layout, waves)
    for places, rows_of_rank in zip(requests.places, rows, strict=True):
        np.testing.assert_array_equal(requests.rows[places], rows_of_rank)
    assert requests.rows.size == np.unique(np.concatenate(rows)).size
    position, wave_arrivals = 0, {wave: [] for wave in range(waves)}
    arrivals = requests.arrivals(node=0)
    for node in range(nodes):
        for wave in range(waves):
            part = slice(position, position + int(requests.counts[node, wave]))
            assert (layout.owner(requests.rows[part]) == node).all()
            assert (requests.rows[part] * 31 % waves == wave).all()
            assert (np.diff(requests.rows[part]) > 0).all()
            if node == 0:
                assert (arrivals[part] == -1).all()
            else:
                wave_arrivals[wave] += arrivals[part].tolist()
            position = part.stop
    in_order = [place for wave in range(waves) for place in wave_arrivals[wave]]
    assert in_order == list(range(len(in_order))), "rows arrive wave by wave, within a wave node by node"


def test_plan_keeps_the_shape_of_the_ids() -> None:
    layout = RowLayout(500, 16, 3)
    assert make_plan(np.zeros((2, 3, 4), np.int64), layout).inverse.shape == (2, 3, 4)
    nothing = make_plan(np.zeros((0, 3, 4), np.int64), layout, 2)
    assert nothing.inverse.shape == (0, 3, 4)
    assert nothing.rail_counts.tolist() == [0, 0, 0]
