"""Which nodes cannot take part in a run, from what all of them say: a pure function.

Where nodes differ, the majority is right. A tie, or a fault that most nodes share, is the run's: no node is to blame.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from engram_megatron.jobs.node_facts import NodeFacts
from engram_megatron.jobs.node_needs import NodeNeeds

MIB = 1024**2
CLOCK_BOUND_S = 2.0
_SHOWN_NODES = 4


@dataclass(frozen=True)
class Clock:
    """One look at a node's clock, in unix seconds: `told` by the node, between the head asking and hearing it."""

    asked: float
    told: float
    heard: float

    @property
    def offset(self) -> float:
        """Of the node's clock against the head's, give or take `uncertainty`."""
        return self.told - (self.asked + self.heard) / 2

    @property
    def uncertainty(self) -> float:
        return (self.heard - self.asked) / 2


@dataclass
class Verdict:
    """`bad_nodes`: name to reason, to leave out of the run. `errors`: what no choice of nodes would cure."""

    bad_nodes: dict[str, str] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)

    def blame(self, reasons: Mapping[str, str], num_nodes: int) -> None:
        """The nodes of `reasons` are bad, unless that is so of more than half of all: then it is an error. The first
        reason of a node stays."""
        if 2 * len(reasons) > num_nodes:
            first = next(iter(reasons))
            self.errors.append(f"{len(reasons)} of {num_nodes} nodes, {first} first: {reasons[first]}")
            return
        for host, reason in reasons.items():
            self.bad_nodes.setdefault(host, reason)


def judge(
    facts: Mapping[str, NodeFacts],
    needs: NodeNeeds,
    clocks: Mapping[str, Clock],
    unseen: Mapping[str, Sequence[str]],
) -> Verdict:
    """Judge the nodes of `facts`, by name. `unseen`: which nodes' files in the run folder a node did not find."""
    verdict = Verdict()
    _apply(verdict, facts, needs, [_own_problem])
    for key in _keys(facts):
        _compare(verdict, facts, *key)
    _compare_clocks(verdict, clocks)
    _compare_folders(verdict, facts, unseen)
    _apply(verdict, facts, needs, [_gpu_problem, _memory_problem, _shm_problem, _nvme_problem])
    return verdict


Rule = Callable[[NodeFacts, NodeNeeds], str | None]


def _apply(verdict: Verdict, facts: Mapping[str, NodeFacts], needs: NodeNeeds, rules: Sequence[Rule]) -> None:
    """Blame the nodes that a rule finds a fault in, which it tells."""
    for rule in rules:
        found = {host: rule(node, needs) for host, node in facts.items()}
        verdict.blame({host: reason for host, reason in found.items() if reason is not None}, len(facts))


Comparison = tuple[str, str, Callable[[NodeFacts], str]]


def _keys(facts: Mapping[str, NodeFacts]) -> list[Comparison]:
    """What must be the same on all nodes: its name, what to do where it is not, and its value on a node."""
    names = dict.fromkeys(name for node in facts.values() for name in node.versions)

    def version(name: str) -> Callable[[NodeFacts], str]:
        return lambda node: node.versions.get(name, "none")

    return [
        *((name, "install the same on all nodes", version(name)) for name in names),
        ("the corpus's fingerprint", "give all nodes the same data.corpus", lambda node: node.corpus),
        ("the newest checkpoint", "give all nodes the same run_dir", lambda node: node.checkpoint or "none"),
        ("the number of GPUs", "look for lost GPUs with nvidia-smi", lambda node: str(node.usable_gpus)),
        ("the kind of GPU", "ask Slurm for one kind", lambda node: " and ".join(sorted(set(node.gpus))) or "none"),
    ]


def _compare(
    verdict: Verdict, facts: Mapping[str, NodeFacts], name: str, cure: str, value: Callable[[NodeFacts], str]
) -> None:
    """Blame the nodes whose value is not that of the majority."""
    groups: dict[str, list[str]] = defaultdict(list)
    for host, node in facts.items():
        if of_node := value(node):  # where it could not be found out, that is a problem of its own
            groups[of_node].append(host)
    if len(groups) < 2:
        return
    first, second = sorted(groups.items(), key=lambda group: -len(group[1]))[:2]
    if len(first[1]) == len(second[1]):
        verdict.errors.append(
            f"nodes differ in {name}, and none is in the majority: {first[0]} on {_names(first[1])}, {second[0]} on "
            f"{_names(second[1])}; {cure}"
        )
        return
    for of_node, hosts in groups.items():
        if of_node != first[0]:
            reason = f"{name} is {of_node} here and {first[0]} on {len(first[1])} of {len(facts)} nodes; {cure}"
            for host in hosts:
                verdict.bad_nodes.setdefault(host, reason)


def _compare_clocks(verdict: Verdict, clocks: Mapping[str, Clock]) -> None:
    if not clocks:
        return
    middle = median(clock.offset for clock in clocks.values())
    off = {host: clock.offset - middle for host, clock in clocks.items()}
    reasons = {
        host: f"its clock is {abs(off[host]):.1f} s {'ahead of' if off[host] > 0 else 'behind'} the other nodes' "
        f"(allowed: {CLOCK_BOUND_S:g} s); start its time service (chronyd, ntpd)"
        for host, clock in clocks.items()
        if abs(off[host]) - clock.uncertainty > CLOCK_BOUND_S
    }
    verdict.blame(reasons, len(clocks))


def _compare_folders(verdict: Verdict, facts: Mapping[str, NodeFacts], unseen: Mapping[str, Sequence[str]]) -> None:
    """A node that sees few of the others' files, or whose file few see, has another folder at that path."""
    lonely: dict[str, set[str]] = {host: set() for host in facts}
    for host, others in unseen.items():
        for other in others:
            lonely[host].add(other)
            lonely[other].add(host)
    if not any(lonely.values()):
        return
    most = len(facts) / 2
    apart = {host for host, others in lonely.items() if len(others) >= most}
    if 2 * len(apart) >= len(facts) or not apart:
        examples = ", ".join(f"{host} does not see that of {others[0]}" for host, others in unseen.items() if others)
        verdict.errors.append(
            f"run_dir is not one folder on all nodes: of the files written there, {examples}; put it "
            "on a file system that all nodes mount"
        )
        return
    for host in sorted(apart):
        verdict.bad_nodes.setdefault(
            host,
            f"run_dir is another folder here: {len(lonely[host])} of {len(facts) - 1} other nodes do not share files "
            "with it; mount the shared file system here",
        )


def _own_problem(node: NodeFacts, _needs: NodeNeeds) -> str | None:
    return node.problems[0] if node.problems else None


def _gpu_problem(node: NodeFacts, needs: NodeNeeds) -> str | None:
    if node.gpu_errors:
        return f"its GPUs count {node.gpu_errors} uncorrected memory errors; reset or replace them"
    if node.gpus and node.usable_gpus < needs.ranks:
        return f"{needs.ranks} ranks need a GPU each, torch sees {node.usable_gpus} of {len(node.gpus)} here"
    return None


def _memory_problem(node: NodeFacts, needs: NodeNeeds) -> str | None:
    of_model = 0 if node.usable_gpus else needs.model_bytes
    needed = needs.table_bytes + of_model
    if needed <= node.memory_bytes:
        return None
    return (
        f"{_mib(needed)} of memory are needed ({_mib(needs.table_bytes)} for tables, {_mib(of_model)} for the model of "
        f"{needs.ranks} ranks), {_mib(node.memory_bytes)} are free; end what else runs here, or use more nodes"
    )


def _shm_problem(node: NodeFacts, needs: NodeNeeds) -> str | None:
    needed = needs.shm_bytes_with_gpus if node.usable_gpus else needs.shm_bytes
    if needed <= node.shm_bytes:
        return None
    return (
        f"{_mib(needed)} of /dev/shm are needed by {needs.ranks} ranks, {_mib(node.shm_bytes)} of "
        f"{_mib(node.shm_size_bytes)} are free; mount it larger (docker: --shm-size), or remove what jobs left there"
    )


def _nvme_problem(node: NodeFacts, needs: NodeNeeds) -> str | None:
    if needs.nvme_bytes <= node.nvme_bytes or node.problems:
        return None
    return (
        f"{_mib(needs.nvme_bytes)} of tables.nvme_dir are needed by {needs.ranks} ranks, {_mib(node.nvme_bytes)} are "
        "free; remove what lies there, or use more nodes"
    )


def _mib(size: int) -> str:
    return f"{size / MIB:,.0f} MiB" if size >= 10 * MIB else f"{size / MIB:.1f} MiB"


def _names(hosts: Sequence[str]) -> str:
    more = len(hosts) - _SHOWN_NODES
    return ", ".join(hosts[:_SHOWN_NODES]) + (f" and {more} more" if more > 0 else "")
