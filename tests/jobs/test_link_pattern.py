"""Rounds of pairs, and who is to blame for the links that fail."""

from __future__ import annotations

import itertools

import pytest
from made_up_nodes import links

from engram_megatron.jobs.link_pattern import Culprits, describe_culprits, find_culprits, slow_links, tournament


@pytest.mark.parametrize("num_nodes", [1, 2, 3, 4, 5, 8, 64])
def test_each_pair_meets_once_and_no_node_twice_in_a_round(num_nodes: int) -> None:
    rounds = tournament(num_nodes)
    pairs = [pair for of_round in rounds for pair in of_round]
    assert sorted(pairs) == list(itertools.combinations(range(num_nodes), 2))
    assert len(rounds) == num_nodes - 1 + num_nodes % 2
    for of_round in rounds:
        assert len({node for pair in of_round for node in pair}) == 2 * len(of_round)


def _pairs_with(node: int, num_nodes: int) -> list[tuple[int, int]]:
    return [(min(node, other), max(node, other)) for other in range(num_nodes) if other != node]


def test_node_that_fails_with_most_is_bad_and_its_partners_are_not() -> None:
    assert find_culprits(links(8, *_pairs_with(3, 8))) == Culprits({3: [0, 1, 2, 4, 5, 6, 7]}, [])
    assert find_culprits(links(3, (0, 1), (1, 2))).nodes == {1: [0, 2]}
    assert find_culprits(links(5)) == Culprits({}, [])


def test_two_bad_nodes_do_not_drag_down_those_that_failed_with_both() -> None:
    culprits = find_culprits(links(4, *_pairs_with(1, 4), *_pairs_with(3, 4)))
    assert (sorted(culprits.nodes), culprits.links) == ([1, 3], [])


def test_link_that_fails_alone_is_a_bad_link() -> None:
    assert find_culprits(links(6, (1, 4))) == Culprits({}, [(1, 4)])
    assert find_culprits(links(2, (0, 1))) == Culprits({}, [(0, 1)])
    assert find_culprits(links(8, (0, 1), (1, 2))) == Culprits({}, [(0, 1), (1, 2)]), "2 of 7 are no majority"


def test_network_in_two_halves_loses_the_one_without_the_first_node() -> None:
    across = [(a, b) for a in (0, 2) for b in (1, 3)]
    assert sorted(find_culprits(links(4, *across)).nodes) in ([1, 3], [3])
    assert 0 not in find_culprits(links(4, *across)).nodes


def test_reasons_name_partners_and_what_was_seen() -> None:
    names = [f"n{number}" for number in range(6)]
    assert describe_culprits(links(6, *_pairs_with(2, 6)), names) == {
        "n2": "5 of its 5 links failed (to n0, n1, n3, ...); from n0 to n2 gloo delivered 5 wrong bytes, the "
        "first at 70; look at its network card and cable"
    }
    assert describe_culprits(links(6, (1, 4)), names) == {
        "n4": "the link between n1 and n4 failed, no other of theirs did: from n1 to n4 gloo delivered 5 wrong bytes, "
        "the first at 70; either may be at fault, n4 is left out"
    }


def test_slow_link_is_told_with_the_median() -> None:
    results = links(4)
    slowed = [r if {r.node, r.partner} != {0, 3} else type(r)(node=r.node, partner=r.partner, transport="gloo", rate=33)
              for r in results]  # fmt: skip
    assert slow_links(results, "abcd") == []
    assert slow_links(slowed, "abcd") == ["the link between a and d is slow: 33 MB/s by gloo, the median is 100 MB/s"]
