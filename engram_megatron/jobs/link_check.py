"""Every pair of nodes exchanges messages whose content both know, over the transports that training will use.

Pairs meet in the rounds of a tournament, N / 2 at a time, each in a process group of its own, which needs no word from
any other node. The first node opens each round when the one before is over; who says nothing in it is not waited for
again.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch._C._distributed_c10d import PrefixStore, Store

from engram_megatron import platform
from engram_megatron.jobs.link_pattern import LinkResult, find_culprits, tournament
from engram_megatron.jobs.node_meeting import Meeting

MESSAGE_BYTES = 4 * 1024**2
ROUND_S = 20.0  # the first NCCL group of a process takes several seconds
ENOUGH_FAILURES = 3  # of a node, before the others stop trying
_GRACE_S = 5.0  # for a round's results on their way to the first node
_NEVER = timedelta(days=1)
_SHOWN_ERROR = 300  # characters
_NEXT_ROUND_S = 30.0  # until the first node opens one, beside the time that another node's meeting may take


def message(sender: int, receiver: int, num_bytes: int) -> NDArray[np.uint8]:
    """The bytes that `sender` has for `receiver`: of each place, mixed with both numbers."""
    words = np.arange(-(-num_bytes // 8), dtype=np.uint64) + (np.uint64(sender) << np.uint64(48))
    words += np.uint64(receiver) << np.uint64(32)
    words *= np.uint64(0x9E3779B97F4A7C15)  # Fibonacci hashing, and its high bits brought down
    words ^= words >> np.uint64(29)
    return words.view(np.uint8)[:num_bytes]


def wrong_bytes(received: NDArray[np.uint8], wanted: NDArray[np.uint8]) -> tuple[int, int]:
    """How many bytes differ, and where the first does (-1: none)."""
    wrong = np.flatnonzero(received != wanted)
    return len(wrong), int(wrong[0]) if len(wrong) else -1


@dataclass
class Link:
    """A process group of this node and a partner, for one meeting. All calls raise `RuntimeError` after `timeout_s`."""

    group: Any  # dist.ProcessGroupGloo or dist.ProcessGroupNCCL
    device: torch.device
    place: int  # of this node in it: 0 or 1
    timeout_s: float

    @classmethod
    def open(cls, transport: str, store: Store, place: int, timeout_s: float) -> Link:
        """Meet the partner under `store`, which no one else uses."""
        timeout = timedelta(seconds=timeout_s)
        if transport == "gloo":
            group: Any = dist.ProcessGroupGloo(store, place, 2, timeout)
            return cls(group, torch.device("cpu"), place, timeout_s)
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = _NEVER  # its watchdog would end the process; `_finish` and `_meet` have limits of their own
        return cls(dist.ProcessGroupNCCL(store, place, 2, options), platform.device(), place, timeout_s)

    def all_reduce(self, values: NDArray[np.int32]) -> NDArray[np.int32]:
        """The sum of both nodes' `values`, int32 [n], which wraps."""
        tensor = torch.from_numpy(values.copy()).to(self.device)
        self._finish(self.group.allreduce([tensor]))
        return tensor.cpu().numpy()

    def all_to_all(self, outgoing: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Send outgoing[i], uint8 [2, n], to the node in place i; what both have sent here, likewise."""
        sent = torch.from_numpy(outgoing).to(self.device)
        received = torch.empty_like(sent)
        self._finish(self.group.alltoall_base(received.view(-1), sent.view(-1), [], []))
        return received.cpu().numpy()

    def _finish(self, work: Any) -> None:
        deadline = time.monotonic() + self.timeout_s
        while self.device.type == "cuda" and not work.is_completed():  # a wait could hold up later links' stream
            if time.monotonic() > deadline:
                raise RuntimeError(f"nothing came within {self.timeout_s:.0f} s")
            time.sleep(1e-4)
        work.wait(timedelta(seconds=self.timeout_s))


OpenLink = Callable[[str, Store, int, float], Link]


def transports() -> list[str]:
    """What training uses between nodes: gloo for what lies on hosts, NCCL for what lies on GPUs."""
    return ["gloo", "nccl"] if "nccl" in platform.backend() else ["gloo"]


def check_links(
    meeting: Meeting,
    present: Sequence[int],
    *,
    round_s: float = ROUND_S,
    message_bytes: int = MESSAGE_BYTES,
    open_link: OpenLink = Link.open,
) -> tuple[list[LinkResult], list[int]]:
    """Try the links between all nodes of `present`, which all call it. The first of them gets what all have found out,
    and the nodes that have stopped answering; the others get their own findings."""
    rounds = [[(present[a], present[b]) for a, b in pairs] for pairs in tournament(len(present))]
    umpire = _Umpire(meeting.connection(), present, rounds, round_s) if meeting.rank == present[0] else None
    if umpire is not None:
        umpire.start()
    own: list[LinkResult] = []
    for number, pairs in enumerate(rounds):
        left_out = meeting.hear(f"round {number}", present[0], round_s + _NEXT_ROUND_S)
        mine = [pair for pair in pairs if meeting.rank in pair and not set(pair) & set(left_out)]
        found = [r for pair in mine for r in _meet(meeting, pair, round_s, message_bytes, open_link)]
        own += found
        meeting.say(f"links of round {number}", [asdict(result) for result in found])
    if umpire is None:
        return own, []
    umpire.join()
    return umpire.results, umpire.silent


class _Umpire(threading.Thread):
    """Opens the rounds, from the first node, and collects what all nodes found out."""

    def __init__(
        self, meeting: Meeting, present: Sequence[int], rounds: Sequence[list[tuple[int, int]]], round_s: float
    ) -> None:
        super().__init__(name="umpire", daemon=True)
        self.meeting = meeting
        self.present = present
        self.rounds = rounds
        self.round_s = round_s
        self.results: list[LinkResult] = []
        self.silent: list[int] = []

    def run(self) -> None:
        for number in range(len(self.rounds)):
            hopeless = find_culprits(self.results, at_least=ENOUGH_FAILURES).nodes
            self.meeting.say(f"round {number}", sorted({*hopeless, *self.silent}))
            expected = [rank for rank in self.present if rank not in self.silent]
            words = self.meeting.hear_all(f"links of round {number}", expected, self.round_s + _GRACE_S)
            self.silent += [rank for rank in expected if rank not in words]
            self.results += [LinkResult(**word) for of_node in words.values() for word in of_node]


def _meet(
    meeting: Meeting, pair: tuple[int, int], round_s: float, message_bytes: int, open_link: OpenLink
) -> list[LinkResult]:
    """Try the link of `pair`, of which this node is one, by each transport until one fails. Ends in `round_s`, in a
    thread that is left behind where it does not."""
    node = meeting.rank
    partner = sum(pair) - node
    done: list[LinkResult] = []
    connection = meeting.connection()
    deadline = time.monotonic() + round_s

    def work() -> None:
        for transport in transports():
            store = PrefixStore(f"preflight/link {pair[0]} {pair[1]} {transport}", connection.store)
            try:
                link = open_link(transport, store, pair.index(node), max(deadline - time.monotonic(), 0.1))
                done.append(_exchange(link, node, partner, transport, message_bytes))
            except RuntimeError as error:  # gloo's and NCCL's, their stores' and time limits
                told = " ".join(str(error).split())[:_SHOWN_ERROR] or type(error).__name__
                done.append(LinkResult(node=node, partner=partner, transport=transport, error=told))
            if done[-1].failed:
                return

    thread = threading.Thread(target=work, name=f"link to {partner}", daemon=True)
    thread.start()
    thread.join(round_s)
    found = list(done)
    if thread.is_alive() and not any(result.failed for result in found):
        transport = transports()[len(found)]
        told = f"nothing came within {round_s:g} s"
        found.append(LinkResult(node=node, partner=partner, transport=transport, error=told))
    return found


def _exchange(link: Link, node: int, partner: int, transport: str, message_bytes: int) -> LinkResult:
    outgoing, incoming = message(node, partner, message_bytes), message(partner, node, message_bytes)
    summed = link.all_reduce(outgoing.view(np.int32))
    wrong, first = wrong_bytes(
        summed.view(np.uint8), (outgoing.view(np.int32) + incoming.view(np.int32)).view(np.uint8)
    )
    messages = np.stack([outgoing, outgoing])  # one of them to this node itself
    started = time.perf_counter()
    received = link.all_to_all(messages)
    seconds = time.perf_counter() - started
    if not wrong:
        wrong, first = wrong_bytes(received[1 - link.place], incoming)
    return LinkResult(
        node=node,
        partner=partner,
        transport=transport,
        rate=message_bytes / seconds / 1e6,
        wrong_bytes=wrong,
        first_wrong=first,
    )
