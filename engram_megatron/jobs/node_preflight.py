"""The preflight of an allocation: nodes meet, say what they are, try their links, and the first one judges."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from engram_megatron.config import RunConfig
from engram_megatron.errors import UsageError
from engram_megatron.jobs.link_check import ROUND_S, Link, OpenLink, check_links
from engram_megatron.jobs.link_pattern import LinkResult, describe_culprits, slow_links
from engram_megatron.jobs.node_facts import NodeFacts, collect_facts, host_file, unseen_files
from engram_megatron.jobs.node_meeting import Meeting, MeetingError
from engram_megatron.jobs.node_needs import NodeNeeds
from engram_megatron.jobs.node_rules import Clock, Verdict, judge
from engram_megatron.training.run_folder import write_json

EXIT_GOOD, EXIT_USAGE, EXIT_BAD_NODES = 0, 2, 3
_FACTS_S = 60.0  # for a node to find out its facts, on slow file systems
_SHOWN_S = 15.0  # in which a new file shows on all nodes of a shared file system
_LATE_S = 10.0  # for an answer that needs no work


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Seconds to wait: for nodes to come, from the first one on; for a round of links."""

    nodes_s: float = 120.0
    round_s: float = ROUND_S


@dataclass(frozen=True, kw_only=True)
class Report:
    """What the first node has found out. `errors` are the run's own: no choice of nodes would cure them."""

    nodes: int
    bad_nodes: dict[str, str]
    warnings: list[str]
    errors: list[str]
    slowest_link: str
    seconds: float

    @property
    def exit_code(self) -> int:
        return EXIT_USAGE if self.errors else EXIT_BAD_NODES if self.bad_nodes else EXIT_GOOD

    def lines(self) -> list[str]:
        """One per problem, and a summary."""
        return [
            *(f"error: {error}" for error in self.errors),
            *(f"bad node {name}: {reason}" for name, reason in self.bad_nodes.items()),
            *(f"warning: {warning}" for warning in self.warnings),
            f"preflight: {self.nodes} nodes, {len(self.bad_nodes)} bad; {self.slowest_link}; {self.seconds:.1f} s",
        ]


def run_preflight(
    config: RunConfig,
    needs: NodeNeeds,
    meeting: Meeting,
    host: str,
    *,
    limits: Limits,
    expected: Mapping[int, str],
    open_link: OpenLink = Link.open,
) -> tuple[int, Report | None]:
    """Take part as node `host`, the `meeting.rank`-th. All nodes call it; `expected`: what nodes that do not come are
    called, by number.

    Returns the exit code, the same on every node, and on the first node the report, which also stands in
    RUN_DIR/job/preflight.json.

    Raises:
        UsageError: on every node, where two of them are one.
        MeetingError: the first node has gone, or did not wait for this one.
    """
    started, run_dir = time.monotonic(), Path(config.run_dir)
    if meeting.rank == 0:
        meeting.say("token", secrets.token_hex(8))
    token = meeting.hear("token", 0, limits.nodes_s)
    meeting.say("facts", asdict(collect_facts(config, host, token)))
    facts = _hear_facts(meeting, limits.nodes_s) if meeting.rank == 0 else {}
    hosts = _present(meeting, limits.nodes_s, facts)
    clocks = _look_at_clocks(meeting, sorted(hosts))
    meeting.say("unseen", unseen_files(run_dir, list(hosts.values()), token, _SHOWN_S))
    results, silent = check_links(meeting, sorted(hosts), round_s=limits.round_s, open_link=open_link)
    host_file(run_dir, host).unlink(missing_ok=True)
    if meeting.rank != 0:
        code = int(meeting.hear("exit code", 0, limits.round_s + _SHOWN_S + _LATE_S))
        meeting.say("end", code)
        return code, None
    unseen = meeting.hear_all("unseen", hosts, _LATE_S)
    verdict = judge(
        {node.host: node for node in facts.values()},
        needs,
        {hosts[rank]: clock for rank, clock in clocks.items()},
        {hosts[rank]: others for rank, others in unseen.items()},
    )
    names = [hosts.get(rank) or expected.get(rank) or f"node {rank}" for rank in range(meeting.num_nodes)]
    _blame_links(verdict, results, names)
    _blame_absent(verdict, names, sorted(hosts), silent, limits)
    seconds = round(time.monotonic() - started, 2)
    report = Report(
        nodes=len(names),
        bad_nodes=verdict.bad_nodes,
        warnings=slow_links(results, names),
        errors=verdict.errors,
        slowest_link=_slowest_link(results, names),
        seconds=seconds,
    )
    write_json(run_dir / "job" / "preflight.json", asdict(report))
    meeting.say("exit code", report.exit_code)
    meeting.hear_all("end", [rank for rank in hosts if rank not in (0, *silent)], _LATE_S)  # the store ends with us
    return report.exit_code, report


def _hear_facts(meeting: Meeting, nodes_s: float) -> dict[int, NodeFacts]:
    words = meeting.hear_all("facts", range(meeting.num_nodes), nodes_s)
    return {rank: NodeFacts(**word) for rank, word in words.items()}


def _present(meeting: Meeting, nodes_s: float, facts: Mapping[int, NodeFacts]) -> dict[int, str]:
    """Names of the nodes that take part, by number. `facts` on the first node, which decides."""
    if meeting.rank == 0:
        meeting.say("present", [(rank, facts[rank].host) for rank in sorted(facts)])
    hosts = {rank: name for rank, name in meeting.hear("present", 0, nodes_s + _FACTS_S)}
    if meeting.rank not in hosts:
        raise MeetingError(f"node {meeting.rank} came too late: the first one has waited {nodes_s:g} s for it")
    twice = sorted({name for name in hosts.values() if [*hosts.values()].count(name) > 1})
    if twice:
        raise UsageError(
            f"the preflight runs more than once on node {twice[0]}; start one task per node (srun --ntasks-per-node=1, "
            "torchrun --nproc-per-node=1)"
        )
    return hosts


def _look_at_clocks(meeting: Meeting, present: Sequence[int]) -> dict[int, Clock]:
    """On the first node all clocks by node, on the others nothing."""
    if meeting.rank != 0:
        meeting.hear("question of the time", 0, _LATE_S)
        meeting.say("clock", time.time())
        return {}
    asked, heard = time.time(), {}
    meeting.say("question of the time", asked)
    meeting.say("clock", asked)
    told = meeting.hear_all("clock", present, _LATE_S, lambda rank: heard.update({rank: time.time()}))
    return {rank: Clock(asked, of_node, heard[rank]) for rank, of_node in told.items()}


def _blame_links(verdict: Verdict, results: Sequence[LinkResult], names: Sequence[str]) -> None:
    for name, reason in describe_culprits(results, names).items():
        verdict.bad_nodes.setdefault(name, reason)


def _blame_absent(
    verdict: Verdict, names: Sequence[str], present: Sequence[int], silent: Sequence[int], limits: Limits
) -> None:
    """Those that did not come, or stopped answering: where they are most of all, the first node is out of reach."""
    absent = [name for rank, name in enumerate(names) if rank not in present]
    if 2 * len(absent) > len(names):
        verdict.bad_nodes[names[0]] = (
            f"{len(absent)} of {len(names)} nodes ({absent[0]} first) did not reach this node, where all meet, within "
            f"{limits.nodes_s:g} s; look at its network card and at firewalls"
        )
        return
    for name in absent:
        verdict.bad_nodes[name] = (
            f"it did not come within {limits.nodes_s:g} s; is it down, cut off, or does Python not start there?"
        )
    for rank in silent:
        verdict.bad_nodes[names[rank]] = (
            f"it stopped answering while links were tried ({limits.round_s:g} s a round); look at its log"
        )


def _slowest_link(results: Sequence[LinkResult], names: Sequence[str]) -> str:
    sound = [result for result in results if not result.failed]
    if not sound:
        return "no link tried" if not results else "no sound link"
    slowest = min(sound, key=lambda result: result.rate)
    return (
        f"slowest link {names[slowest.partner]} to {names[slowest.node]} {slowest.rate:.0f} MB/s by {slowest.transport}"
    )
