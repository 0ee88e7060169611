"""Who meets whom when every pair of nodes is tried, and whose fault it is when some fail. Arithmetic only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

SLOW_SHARE = 1 / 3  # of the median rate
_SHOWN_PARTNERS = 3


@dataclass(frozen=True, kw_only=True)
class LinkResult:
    """What one node found out about the link to a partner. Goes through JSON by `dataclasses.asdict`."""

    node: int  # who says so
    partner: int
    transport: str
    rate: float = 0.0  # MB/s that came in during the all-to-all; 0 where it failed
    wrong_bytes: int = 0  # of what came in
    first_wrong: int = -1  # their first, by its place in the message
    error: str = ""  # why nothing came in

    @property
    def failed(self) -> bool:
        return bool(self.error) or self.wrong_bytes > 0

    def in_words(self) -> str:
        if self.wrong_bytes:
            return f"{self.transport} delivered {self.wrong_bytes} wrong bytes, the first at {self.first_wrong}"
        return f"{self.transport}: {self.error}"


def tournament(num_nodes: int) -> list[list[tuple[int, int]]]:
    """Rounds in which each node meets at most one other, and after which each pair has met once: the circle method.

    N - 1 rounds of N / 2 pairs (a, b), a < b; with an odd N, N rounds in each of which one node rests.
    """
    places = [*range(num_nodes)] + [-1] * (num_nodes % 2)
    rounds = []
    for _ in range(len(places) - 1):
        pairs = zip(places[: len(places) // 2], reversed(places), strict=False)
        rounds.append(sorted((min(pair), max(pair)) for pair in pairs if -1 not in pair))
        places = [places[0], places[-1], *places[1:-1]]
    return rounds


@dataclass(frozen=True)
class Culprits:
    """`nodes`: each with the partners that it failed with. `links`: pairs that failed alone."""

    nodes: dict[int, list[int]]
    links: list[tuple[int, int]]


def find_culprits(results: Iterable[LinkResult], at_least: int = 2) -> Culprits:
    """Explain the failed links among `results` by as few bad nodes as can be.

    A node that failed with more than half of its partners, and with `at_least` so many, is bad; its links say nothing
    about its partners any more. The one with the most failures goes first (of equals, the one with the highest
    number: a network that fell in two halves loses that without node 0). Failed links that are left are bad links.
    """
    met, failed = set(), set()
    for result in results:
        pair = (min(result.node, result.partner), max(result.node, result.partner))
        met.add(pair)
        if result.failed:
            failed.add(pair)
    nodes: dict[int, list[int]] = {}
    while True:
        failures, meetings = _count(failed), _count(met)
        suspects = [n for n, count in failures.items() if count >= at_least and 2 * count > meetings[n]]
        if not suspects:
            return Culprits(nodes, sorted(failed))
        worst = max(suspects, key=lambda n: (failures[n], n))
        nodes[worst] = sorted(sum(pair) - worst for pair in failed if worst in pair)
        met = {pair for pair in met if worst not in pair}
        failed = {pair for pair in failed if worst not in pair}


def _count(pairs: set[tuple[int, int]]) -> Counter[int]:
    """In how many of `pairs` each node is."""
    return Counter(node for pair in pairs for node in pair)


def describe_culprits(results: Sequence[LinkResult], names: Sequence[str]) -> dict[str, str]:
    """Name of each node that is to be left out, and why, with the numbers of one failed link.

    Of a link that failed alone either end may be at fault; the second one is left out, whose number is higher.
    """
    culprits = find_culprits(results)
    reasons = {}
    for node, partners in culprits.nodes.items():
        shown = ", ".join(names[partner] for partner in partners[:_SHOWN_PARTNERS])
        shown += ", ..." if len(partners) > _SHOWN_PARTNERS else ""
        met = len({result.partner for result in results if result.node == node} | set(partners))
        reasons[names[node]] = (
            f"{len(partners)} of its {met} links failed (to {shown}); "
            f"{_example(results, (min(node, partners[0]), max(node, partners[0])), names)}; "
            "look at its network card and cable"
        )
    for pair in culprits.links:
        first, second = (names[node] for node in pair)
        reasons.setdefault(
            second,
            f"the link between {first} and {second} failed, no other of theirs did: {_example(results, pair, names)}; "
            f"either may be at fault, {second} is left out",
        )
    return reasons


def _example(results: Iterable[LinkResult], pair: tuple[int, int], names: Sequence[str]) -> str:
    """What was seen on the link of `pair`: wrong bytes before an error, which may only follow from them."""
    seen = [r for r in results if r.failed and {r.node, r.partner} == set(pair)]
    worst = max(seen, key=lambda result: (result.wrong_bytes, result.node))
    return f"from {names[worst.partner]} to {names[worst.node]} {worst.in_words()}"


def slow_links(results: Iterable[LinkResult], names: Sequence[str]) -> list[str]:
    """A warning for each link whose rate is below a third of the median's of its transport. Slowest first."""
    warnings = []
    sound = [result for result in results if not result.failed]
    for transport in sorted({result.transport for result in sound}):
        rates: dict[tuple[int, int], float] = {}
        for result in sound:
            if result.transport == transport:
                pair = (min(result.node, result.partner), max(result.node, result.partner))
                rates[pair] = min(result.rate, rates.get(pair, result.rate))
        middle = median(rates.values())
        for (first, second), rate in sorted(rates.items(), key=lambda item: item[1]):
            if rate < SLOW_SHARE * middle:
                warnings.append(
                    f"the link between {names[first]} and {names[second]} is slow: {rate:.0f} MB/s by {transport}, "
                    f"the median is {middle:.0f} MB/s"
                )
    return warnings
