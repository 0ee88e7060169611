"""A `RunStatus` as lines for people: one screen, whatever the number of ranks, hosts and events."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from textwrap import wrap

from engram_megatron.jobs.run_state import in_words
from engram_megatron.jobs.status import RunStatus
from engram_megatron.training.run_events import Event, in_short

MOST_EVENTS, MOST_STARTS, MOST_HOSTS, MOST_BAD_NODES, WIDTH = 10, 4, 4, 4, 118
_GIB = 1 << 30


def status_lines(status: RunStatus) -> Iterator[str]:
    why = f": {status.state.why}" if status.state.why else ""
    yield f"{status.name or 'run'}  {status.run_dir}"
    yield f"state        {status.state.name}{why}"
    yield from _progress_lines(status)
    yield from _checkpoint_lines(status)
    yield from _rank_lines(status)
    yield from _history_lines(status)


def _progress_lines(status: RunStatus) -> Iterator[str]:
    if status.num_steps is None:
        return
    done = status.step / status.num_steps
    yield f"step         {status.step:,} of {status.num_steps:,} ({done:.1%})"
    speed = f", {status.tokens_per_second:,.0f} tokens/s" if status.tokens_per_second else ""
    mfu = f", MFU {status.numbers['perf/mfu']:.1%}" if "perf/mfu" in status.numbers else ""
    pace = f", {status.seconds_per_step:.3g} s a step" if status.seconds_per_step else ""
    yield f"tokens       {_count(status.tokens)} of {_count(status.tokens_of_all_steps or 0)}{speed}{pace}{mfu}"
    if status.seconds_left is not None and status.state.name == "running":
        at = time.strftime("%a %d %b %H:%M", time.localtime(time.time() + status.seconds_left))
        yield f"ends in      {in_words(status.seconds_left)} at this pace ({at})"
    losses = []
    if "train/loss" in status.numbers:
        losses.append(f"{status.numbers['train/loss']:.4f} at step {status.numbers['step']:,.0f}")
    if status.validation is not None:
        losses.append(f"validation {status.validation['validation/loss']:.4f} at step {status.validation['step']:,.0f}")
    if losses:
        yield f"loss         {', '.join(losses)}"


def _checkpoint_lines(status: RunStatus) -> Iterator[str]:
    if status.num_steps is None:
        return
    newest = "none yet"
    if status.newest_checkpoint is not None and status.newest_checkpoint_age_s is not None:
        newest = f"newest at step {status.newest_checkpoint:,}, {in_words(status.newest_checkpoint_age_s)} ago"
        newest += f" ({status.checkpoints} kept)"
    following = ""
    if status.next_checkpoint is not None:
        following = f"; next at step {status.next_checkpoint:,}"
        if status.seconds_per_step and status.state.name == "running":
            following += f" in about {in_words((status.next_checkpoint - status.step) * status.seconds_per_step)}"
    yield f"checkpoints  {newest}{following}"
    if status.rollbacks:
        last, times = status.rollbacks[-1], len(status.rollbacks)
        told = f"the last of {times}: " if times > 1 else ""
        yield _short(f"rollbacks    {told}{last.details}")


def _rank_lines(status: RunStatus) -> Iterator[str]:
    if not status.ranks:
        return
    slow = [
        f"rank {found.rank} on {found.host} "
        + (f"{found.slowdown:.2f} x the median" if found.slowdown else f"silent for {in_words(found.silent_s or 0)}")
        for found in status.stragglers
    ]
    hosts = f"{len(status.hosts)} hosts" if len(status.hosts) > 1 else "1 host"
    told = f"last seen {in_words(status.seen_s_ago or 0)} ago"
    if status.state.name in ("running", "hanging"):
        told = f"stragglers: {'; '.join(slow) or 'none'}"
    yield f"ranks        {status.ranks} on {hosts}; {told}"
    label = "memory"
    for host in status.hosts[:MOST_HOSTS]:
        device = f", GPU {host.device_bytes / _GIB:.1f} GiB" if host.device_bytes else ""
        resident = f"{host.ranks} ranks resident {host.resident_bytes / _GIB:.1f} GiB"
        yield f"{label:<13}{host.host}: {host.available_bytes / _GIB:.1f} GiB left, {resident}{device}"
        label = ""
    if len(status.hosts) > MOST_HOSTS:
        yield f"             {len(status.hosts) - MOST_HOSTS} more hosts, with more left"


def _history_lines(status: RunStatus) -> Iterator[str]:
    if not status.events:
        return
    label = "bad nodes"
    for name, why in list(status.bad_nodes.items())[-MOST_BAD_NODES:]:
        yield from wrap(f"{name}: {why}", WIDTH, initial_indent=f"{label:<13}", subsequent_indent=" " * 15)
        label = ""
    if len(status.bad_nodes) > MOST_BAD_NODES:
        yield f"             {len(status.bad_nodes) - MOST_BAD_NODES} more, found before"
    yield f"starts       {len(status.starts)}"
    asked = _asked_nodes(status.events)
    for number, event in list(enumerate(status.starts))[-MOST_STARTS:]:
        step, nodes = event.fields.get("step"), event.fields.get("nodes", [])
        count = f"{len(nodes)} of {asked[number]}" if len(nodes) < asked[number] else f"{len(nodes)}"
        yield f"  {_when(event)}  job {event.job or '-'}  from step {step} on {count} nodes: {in_short(nodes)}"
    shown = status.events[-MOST_EVENTS:]
    yield f"events       the last {len(shown)} of {len(status.events)}"
    for event in shown:
        yield _short(f"  {_when(event)}  {event.job:<8} {event.kind.replace('_', ' '):<10} {event.details}")


def _short(line: str) -> str:
    return line if len(line) <= WIDTH else line[: WIDTH - 3] + "..."


def _asked_nodes(events: Sequence[Event]) -> list[int]:
    """For each start how many nodes its submission had asked for; 0 where that is not known."""
    asked, of_starts = 0, []
    for event in events:
        if event.kind == "submitted":
            asked = event.fields.get("nodes", 0)
        if event.kind == "started":
            of_starts.append(asked)
    return of_starts


def _when(event: Event) -> str:
    return time.strftime("%m-%d %H:%M:%S", time.localtime(event.time))


def _count(number: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:,.0f}"
