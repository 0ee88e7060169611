"""Which nodes are named, and with which numbers, for made-up facts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from made_up_nodes import MIB, NEEDS, node

from engram_megatron.jobs.node_facts import NodeFacts
from engram_megatron.jobs.node_rules import Clock, Verdict, judge


def _judge(*nodes: NodeFacts, clocks: dict[str, Clock] | None = None, unseen: Any = None) -> Verdict:
    return judge({of_node.host: of_node for of_node in nodes}, NEEDS, clocks or {}, unseen or {})


def test_equal_nodes_that_suffice_are_good() -> None:
    assert _judge(node("a"), node("b"), node("c")) == Verdict()
    exact = NEEDS.table_bytes + NEEDS.model_bytes
    assert _judge(node("a", memory_bytes=exact, shm_bytes=NEEDS.shm_bytes)) == Verdict()


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (
            {"versions": {"python": "3.12.1", "torch": "2.12.0"}},
            "torch is 2.12.0 here and 2.11.0 on 2 of 3 nodes; install the same on all nodes",
        ),
        ({"corpus": "xyz"}, "the corpus's fingerprint is xyz here and abc on 2 of 3 nodes; give all nodes the same"),
        ({"checkpoint": ""}, "the newest checkpoint is none here and step_00000020 (manifest's CRC-32C 00000001) on 2"),
        ({"usable_gpus": 3}, "the number of GPUs is 3 here and 0 on 2 of 3 nodes"),
        (
            {"memory_bytes": 799 * MIB},
            "800 MiB of memory are needed (600 MiB for tables, 200 MiB for the model of 2 ranks), 799 MiB are free",
        ),
        ({"shm_bytes": 7 * MIB}, "8.0 MiB of /dev/shm are needed by 2 ranks, 7.0 MiB of 64 MiB are free"),
        ({"gpu_errors": 2}, "its GPUs count 2 uncorrected memory errors"),
        ({"corpus": "", "problems": ["corpus gone"]}, "corpus gone"),
    ],
)
def test_node_that_differs_or_does_not_suffice_is_named_with_its_numbers(fault: Any, reason: str) -> None:
    verdict = _judge(node("a"), node("b", **fault), node("c"))
    assert verdict.errors == []
    assert list(verdict.bad_nodes) == ["b"]
    assert reason in verdict.bad_nodes["b"]
    assert "\n" not in verdict.bad_nodes["b"]


def test_tie_is_an_error_that_names_both_groups() -> None:
    other = {"versions": {"python": "3.12.1", "torch": "2.12.0"}}
    verdict = _judge(node("a"), node("b", **other), node("c"), node("d", **other))
    assert verdict.bad_nodes == {}
    assert verdict.errors == [
        "nodes differ in torch, and none is in the majority: 2.11.0 on a, c, 2.12.0 on b, d; install the same on all "
        "nodes"
    ]


def test_fault_of_most_nodes_is_the_runs_and_not_theirs() -> None:
    verdict = _judge(*(node(name, memory_bytes=MIB) for name in "ab"), node("c"))
    assert verdict.bad_nodes == {}
    assert [error[:35] for error in verdict.errors] == ["2 of 3 nodes, a first: 800 MiB of m"]


def test_gpus_hold_the_model_and_need_more_shared_memory() -> None:
    with_gpu = {"gpus": ["H100"] * 2, "usable_gpus": 2, "memory_bytes": 600 * MIB, "shm_bytes": 256 * MIB}
    nodes = [node(name, **with_gpu) for name in "abc"]
    assert _judge(*nodes) == Verdict()
    assert "256 MiB of /dev/shm" in _judge(*nodes[:2], replace(nodes[2], shm_bytes=255 * MIB)).bad_nodes["c"]
    too_few = _judge(*(replace(of_node, usable_gpus=1) for of_node in nodes))
    assert too_few.errors == ["3 of 3 nodes, a first: 2 ranks need a GPU each, torch sees 1 of 2 here"]


def test_clock_is_off_only_beyond_what_asking_took() -> None:
    def verdict(told: float, heard: float) -> Verdict:
        sound = {name: Clock(asked=1000.0, told=1000.01, heard=1000.02) for name in "ab"}
        return _judge(*(node(name) for name in "abc"), clocks=sound | {"c": Clock(1000.0, told, heard)})

    assert verdict(1003.0, 1000.02).bad_nodes == {
        "c": "its clock is 3.0 s ahead of the other nodes' (allowed: 2 s); start its time service (chronyd, ntpd)"
    }
    assert "3.0 s behind" in verdict(997.02, 1000.02).bad_nodes["c"]
    assert verdict(1003.0, 1003.0).bad_nodes == {}  # the question may have taken the 3 s


def test_first_nodes_own_clock_is_judged_as_any() -> None:
    far = Clock(asked=900.0, told=1000.0, heard=900.02)  # the first node asks, 100 s behind all others
    clocks = {"a": Clock(900.0, 900.01, 900.02), "b": far, "c": far}
    assert list(_judge(*(node(name) for name in "abc"), clocks=clocks).bad_nodes) == ["a"]


def test_node_with_another_folder_is_named_and_two_halves_are_an_error() -> None:
    nodes = [node(name) for name in "abcd"]
    apart = _judge(*nodes, unseen={"a": ["d"], "b": ["d"], "c": ["d"], "d": ["a", "b", "c"]})
    assert list(apart.bad_nodes) == ["d"]
    assert "run_dir is another folder here: 3 of 3 other nodes" in apart.bad_nodes["d"]
    halves = _judge(*nodes, unseen={"a": ["c", "d"], "b": ["c", "d"], "c": ["a", "b"], "d": ["a", "b"]})
    assert halves.bad_nodes == {}
    assert "run_dir is not one folder on all nodes" in halves.errors[0]
