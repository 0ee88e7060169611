"""Where the nodes of an allocation meet before anything else: a TCPStore on the first one, and words left in it.

Nodes speak through the store only, so one whose links to others are broken is still heard, and each wait has a limit.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import Store

from engram_megatron.errors import UsageError

_POLL_S = 0.01


class MeetingError(Exception):
    """The first node has gone, or did not wait for this one. The message is one line."""


class Meeting:
    """Node `rank` of `num_nodes`, which may not all come. `store` is its connection to the first node."""

    def __init__(self, store: Store, rank: int, num_nodes: int) -> None:
        self.store = store
        self.rank = rank
        self.num_nodes = num_nodes

    @classmethod
    def join(cls, address: str, port: int, rank: int, num_nodes: int, timeout_s: float, *, serves: bool) -> Meeting:
        """Meet at `address`:`port`, where the node that `serves` keeps the store (under torchrun: its agent).

        Raises `UsageError` where the port cannot be served, `MeetingError` where it cannot be reached in time.
        """
        limit = timedelta(seconds=timeout_s)
        try:
            store = dist.TCPStore(address, port, is_master=serves, wait_for_workers=False, timeout=limit)  # type: ignore[attr-defined]
        except RuntimeError as error:
            told = str(error).splitlines()[0]
            if serves:
                raise UsageError(
                    f"the first node cannot listen on port {port} ({told}); choose another --master-port"
                ) from error
            raise MeetingError(
                f"node {rank} cannot reach the first node at {address}:{port} within {timeout_s:g} s ({told}); check "
                "--master-addr, and that no firewall stands between the nodes"
            ) from error
        return cls(store, rank, num_nodes)

    def connection(self) -> Meeting:
        """The same through a connection of its own, for another thread: a wait holds a connection."""
        return Meeting(self.store.clone(), self.rank, self.num_nodes)  # type: ignore[attr-defined]

    def say(self, subject: str, value: Any) -> None:
        """Leave `value`, which goes through JSON, as this node's word on `subject`."""
        self.store.set(_key(subject, self.rank), json.dumps(value))

    def hear(self, subject: str, rank: int, timeout_s: float) -> Any:
        """The word of node `rank`. Raises `MeetingError` where it has not come in `timeout_s` seconds."""
        key = _key(subject, rank)
        try:
            self.store.wait([key], timedelta(seconds=timeout_s))
            return json.loads(self.store.get(key))
        except dist.DistError as error:
            raise MeetingError(
                f"node {self.rank} has not heard from node {rank} ({subject}) in {timeout_s:g} s, or lost the first "
                "node: look at what that one printed"
            ) from error

    def hear_all(
        self, subject: str, ranks: Iterable[int], timeout_s: float, heard: Callable[[int], None] = lambda _rank: None
    ) -> dict[int, Any]:
        """The words of `ranks` by node, without those that have not come when `timeout_s` seconds are over. `heard` is
        called for each as it comes."""
        missing = sorted(ranks)
        words: dict[int, Any] = {}
        deadline = time.monotonic() + timeout_s
        while missing:
            for rank in [rank for rank in missing if self.store.check([_key(subject, rank)])]:
                heard(rank)
                words[rank] = json.loads(self.store.get(_key(subject, rank)))
                missing.remove(rank)
            if time.monotonic() > deadline:
                break
            if missing:
                time.sleep(_POLL_S)
        return words


def _key(subject: str, rank: int) -> str:
    return f"preflight/{subject}/{rank}"
