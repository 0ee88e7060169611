"""Links between processes of this host: sound ones, one that changes bytes, one that hangs, a node that is gone.

What breaks a link here takes the place of `Link` in the node that it happens to."""

from __future__ import annotations

import itertools
import time
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from ranks import free_port, run_ranks

ROUND_S = 2.0
MESSAGE_BYTES = 100_004


def _check(rank: int, num_ranks: int, port: int, fault: str, faulty: int) -> Any:
    from engram_megatron import platform
    from engram_megatron.jobs.link_check import Link, check_links
    from engram_megatron.jobs.node_meeting import Meeting

    class Corrupting(Link):
        """Its cable turns one bit of what leaves this node."""

        def all_to_all(self, outgoing: NDArray[np.uint8]) -> NDArray[np.uint8]:
            outgoing[:, 54_321] ^= 4
            return super().all_to_all(outgoing)

    class Hanging(Link):
        def all_to_all(self, outgoing: NDArray[np.uint8]) -> NDArray[np.uint8]:
            time.sleep(1000)
            raise AssertionError

    platform.limit_threads(1)
    platform.install()
    meeting = Meeting.join("127.0.0.1", port, rank, num_ranks, 30, serves=rank == 0)
    kinds = {"corrupt": Corrupting, "hang": Hanging}
    kind = kinds[fault] if fault in kinds and rank == faulty else Link
    started = time.monotonic()
    if fault == "gone" and rank == faulty:
        meeting.hear("end", 0, 60)
        return None
    found = check_links(meeting, range(num_ranks), round_s=ROUND_S, message_bytes=MESSAGE_BYTES, open_link=kind.open)
    if rank == 0:
        meeting.say("end", 0)
        time.sleep(0.5)  # the store ends with this rank
    return (*found, time.monotonic() - started)


def _first_nodes(num_ranks: int, fault: str, faulty: int = 1) -> Any:
    return run_ranks(_check, num_ranks, free_port(), fault, faulty)[0]


def test_sound_links_are_tried_both_ways_and_their_rates_told() -> None:
    results, silent, _ = _first_nodes(3, "none")
    assert sorted((r.node, r.partner) for r in results) == sorted(itertools.permutations(range(3), 2))
    assert not any(result.failed for result in results)
    assert all(result.rate > 0 for result in results)
    assert silent == []


def test_changed_byte_is_found_at_its_place_by_those_who_received_it() -> None:
    from engram_megatron.jobs.link_pattern import find_culprits

    results, _, _ = _first_nodes(3, "corrupt")
    failed = {(r.partner, r.node): (r.wrong_bytes, r.first_wrong) for r in results if r.failed}
    assert failed == {(1, 0): (1, 54_321), (1, 2): (1, 54_321)}
    assert list(find_culprits(results).nodes) == [1]


def test_hanging_link_ends_with_its_round_and_others_go_on() -> None:
    results, silent, seconds = _first_nodes(3, "hang")
    assert {(r.node, r.partner) for r in results if not r.failed} == {(0, 2), (2, 0)}
    assert silent == []
    assert seconds < 3 * ROUND_S + 5


@pytest.mark.slow
def test_node_that_says_nothing_is_named_and_not_waited_for_again() -> None:
    results, silent, seconds = _first_nodes(3, "gone")
    assert silent == [1]
    assert {(r.node, r.partner) for r in results if not r.failed} == {(0, 2), (2, 0)}
    assert seconds < 2 * (ROUND_S + 5) + 5
