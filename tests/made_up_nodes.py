"""Facts, needs and findings of made-up nodes, for tests/jobs."""

from __future__ import annotations

from typing import Any

from engram_megatron.jobs.link_pattern import LinkResult
from engram_megatron.jobs.node_facts import NodeFacts
from engram_megatron.jobs.node_needs import NodeNeeds

MIB = 1024**2
NEEDS = NodeNeeds(
    ranks=2,
    table_bytes=600 * MIB,
    model_bytes=200 * MIB,
    nvme_bytes=0,
    shm_bytes=8 * MIB,
    shm_bytes_with_gpus=256 * MIB,
)


def node(host: str, **other: Any) -> NodeFacts:
    """A node without a fault, but for `other`."""
    sound: dict[str, Any] = {
        "host": host,
        "versions": {"python": "3.12.1", "torch": "2.11.0"},
        "cores": 8,
        "memory_bytes": 1000 * MIB,
        "shm_size_bytes": 64 * MIB,
        "shm_bytes": 64 * MIB,
        "gpus": [],
        "usable_gpus": 0,
        "gpu_errors": 0,
        "corpus": "abc",
        "checkpoint": "step_00000020 (manifest's CRC-32C 00000001)",
        "nvme_bytes": 0,
        "problems": [],
    }
    return NodeFacts(**sound | other)


def links(num_nodes: int, *bad: tuple[int, int], rate: float = 100.0) -> list[LinkResult]:
    """What all nodes say when the pairs `bad` fail: the second node of each gets 5 wrong bytes, the first nothing."""
    found = []
    for a in range(num_nodes):
        for b in range(num_nodes):
            if a == b:
                continue
            if (b, a) in bad:
                found.append(LinkResult(node=a, partner=b, transport="gloo", wrong_bytes=5, first_wrong=70, rate=rate))
            elif (a, b) in bad:
                found.append(LinkResult(node=a, partner=b, transport="gloo", error="nothing came"))
            else:
                found.append(LinkResult(node=a, partner=b, transport="gloo", rate=rate))
    return found
