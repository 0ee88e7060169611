"""One kind of traffic of a rank, in the words of `torch.distributed`."""

from __future__ import annotations

from typing import Literal, NamedTuple

Group = Literal[
    "data",  # data x context ranks: replicas of everything but routed experts
    "expert data",  # replicas of the same routed experts
    "tensor",
    "tensor x context",
    "context",
    "expert",
    "pipeline",
    "embedding",  # first and last pipeline rank
    "tables",  # all ranks of the job, between their host memories
    "control",  # several groups: numbers of a few bytes
]
# "broadcast" is planned nowhere: who counts what is sent would find one
Collective = Literal["all-reduce", "all-gather", "reduce-scatter", "all-to-all", "broadcast", "send"]
ID_BYTES = 8


class Transfer(NamedTuple):
    """What a rank sends in one step for one purpose."""

    purpose: str
    group: Group
    collective: Collective
    bytes: int


def all_reduced(size: float, ranks: int) -> int:
    """Bytes sent by one rank of a ring that all-reduces `size` bytes."""
    return round(2 * size * (ranks - 1) / ranks)


def to_others(size: float, ranks: int) -> int:
    """Bytes sent by one rank: of `size` bytes that belong in equal parts to all ranks, those of the others."""
    return round(size * (ranks - 1) / ranks)
