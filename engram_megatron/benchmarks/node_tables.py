"""Tables on two ranks: one node against two, deduplicated bytes, and what a step waits for.

Two ranks are forked on this machine. As two nodes they exchange by gloo over TCP, as one node they read each other's
rows in shared memory.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from engram_kernels.catch_up import CatchUp
from engram_megatron import platform
from engram_megatron.benchmarks.row_ids import TextTokens
from engram_megatron.gather.groups import make_groups, open_node_shards
from engram_megatron.gather.lookup import RowLookup
from engram_megatron.gather.topology import Topology
from engram_megatron.gather.unique_rows import UniqueRows
from engram_megatron.gather.worker import Worker
from engram_megatron.optimizer.row_adam import RowAdam
from engram_megatron.tables.row_layout import RowLayout
from engram_megatron.tables.table_shard import TableShard

RANKS = 2
ROW_DIM = 80
# Of one rank's step, and of one of its microbatches: 64k tokens, of one layer; 80 such ranks make the paper's batch.
MICROBATCHES, LOOKUPS = 16, 65_536
STEPS, WARM_UP = 15, 3
LR = 1e-3


@dataclass(frozen=True)
class StepTimes:
    """Median seconds of one rank's steps."""

    lookup: float  # plan and all waves
    plan: float
    first_wave: float
    waves: float  # all of them
    give_back: float  # gradients to their owners
    update: float
    in_turn: float  # all of it
    beside: float  # the same beside a sleep as long as `in_turn`
    wire_bytes: int  # rows and ids received over the network in one step
    unique_bytes: int  # what distinct rows of the node and their ids are
    lookup_bytes: int  # what all lookups and their ids would be, for rows of other nodes


def measure_ranks(rank: int, world_size: int, num_rows: int, ids: list[NDArray[np.int64]], nodes: int) -> StepTimes:
    """On each of `RANKS` forked ranks. `ids` [MICROBATCHES, LOOKUPS] of each step, different on each rank."""
    platform.limit_threads(1)
    lookup, adam = _tables(rank, world_size, num_rows, nodes)
    offset = rank * num_rows // world_size  # the ranks read other text
    steps = [(step + offset) % num_rows for step in ids]
    times: dict[str, list[float]] = {
        name: [] for name in ("plan", "first", "waves", "backward", "back", "update", "step")
    }
    statistics_of_step = None
    for step in steps:
        started = time.perf_counter()
        rows = _timed(times["plan"], partial(lookup.plan, step))
        begun = time.perf_counter()
        _timed(times["first"], lambda: lookup.fetch(rows, 0))  # noqa: B023
        for wave in range(1, lookup.num_waves):
            lookup.fetch(rows, wave)
        times["waves"].append(time.perf_counter() - begun)
        _timed(times["backward"], partial(_backward, rows))
        gradients = _timed(times["back"], lambda: lookup.return_gradients(rows))  # noqa: B023
        _timed(times["update"], lambda: adam.step(gradients, LR))  # noqa: B023
        times["step"].append(time.perf_counter() - started)
        statistics_of_step = rows.statistics
    medians = {name: statistics.median(values[WARM_UP:]) for name, values in times.items()}
    beside = _beside(lookup, adam, steps, medians["step"])
    assert statistics_of_step is not None
    row_bytes = ROW_DIM * lookup.shard.rows.weight.itemsize
    foreign = lookup.layout.owner(steps[-1]) // lookup.layout.shards_per_node != lookup.topology.node
    return StepTimes(
        lookup=medians["plan"] + medians["waves"],
        plan=medians["plan"],
        first_wave=medians["first"],
        waves=medians["waves"],
        give_back=medians["back"],
        update=medians["update"],
        in_turn=medians["step"],
        beside=beside,
        wire_bytes=statistics_of_step.row_bytes_received + statistics_of_step.id_bytes_sent,
        unique_bytes=int(np.unique(steps[-1][foreign]).size) * (row_bytes + 8),
        lookup_bytes=int(foreign.sum()) * (row_bytes + 8),
    )


def step_ids(text: TextTokens, num_rows: int) -> list[NDArray[np.int64]]:
    """Row ids of `STEPS` steps of real text, int64 [MICROBATCHES, LOOKUPS] each."""
    size = MICROBATCHES * LOOKUPS
    every = text.rows(size * STEPS, num_rows)
    return list(every.reshape(STEPS, MICROBATCHES, LOOKUPS))


def _tables(rank: int, world_size: int, num_rows: int, nodes: int) -> tuple[RowLookup, RowAdam]:
    topology = Topology(rank, nodes, world_size // nodes)
    layout = RowLayout(num_rows, 4096, world_size, nodes)
    shard = TableShard(layout, rank, ROW_DIM, "bfloat16")
    shard.initialize(seed=1, std=0.02)
    adam = RowAdam(shard, CatchUp(0.9, 0.95, 1e-20))
    shards = open_node_shards(shard, topology)
    return RowLookup(shards, adam.read_as_of, make_groups(topology, timeout_s=600), num_waves=2), adam


def _beside(lookup: RowLookup, adam: RowAdam, steps: list[NDArray[np.int64]], compute_s: float) -> float:
    """Median step of the order in which training does it, with a sleep for the model."""
    worker = Worker(beside=True)
    times = []
    ahead = _ask(worker, lookup, steps[0])
    ahead.fetch()
    for number, _ in enumerate(steps):
        started = time.perf_counter()
        now = ahead
        following = steps[(number + 1) % len(steps)]
        ahead = _ask(worker, lookup, following)
        now.waves[0].result()
        computed = time.perf_counter() + compute_s
        for wave in now.waves:
            wave.result()
        rows = now.planned.result()
        _backward(rows)  # a part of the model's time
        time.sleep(max(0.0, computed - time.perf_counter()))
        gradients = worker.submit("return", lambda: lookup.return_gradients(rows)).result()  # noqa: B023
        worker.submit("update", lambda: adam.step(gradients, LR))  # noqa: B023
        ahead.fetch()
        times.append(time.perf_counter() - started)
    worker.finish()
    worker.close()
    return statistics.median(times[WARM_UP:])


class _Asked:
    def __init__(self, worker: Worker, lookup: RowLookup, ids: NDArray[np.int64]) -> None:
        self.worker, self.lookup = worker, lookup
        self.planned = worker.submit("plan", lambda: lookup.plan(ids))
        self.waves: list[Any] = []

    def fetch(self) -> None:
        for wave in range(self.lookup.num_waves):
            self.waves.append(self.worker.submit("fetch", partial(self._fetch_wave, wave)))

    def _fetch_wave(self, wave: int) -> None:
        self.lookup.fetch(self.planned.result(), wave)


def _ask(worker: Worker, lookup: RowLookup, ids: NDArray[np.int64]) -> _Asked:
    return _Asked(worker, lookup, ids)


def _backward(rows: UniqueRows) -> None:
    """What the backward of the model adds, microbatch by microbatch."""
    gradient = torch.full((LOOKUPS, ROW_DIM), 1e-3)
    for places in rows.plan.inverse:
        rows.gradient.add(torch.from_numpy(places), gradient)


def _timed(times: list[float], call: Callable[[], Any]) -> Any:
    started = time.perf_counter()
    result = call()
    times.append(time.perf_counter() - started)
    return result


def lines(text: TextTokens, num_rows: int, run: Callable[..., list[StepTimes]]) -> Iterator[str]:
    """The comparisons as text; `run` is `layouts.forked_ranks.run_ranks`."""
    ids = step_ids(text, num_rows)
    shared, apart = (max_of(run(measure_ranks, RANKS, num_rows, ids, nodes, timeout_s=600.0)) for nodes in (1, 2))
    yield f"{RANKS} ranks, {MICROBATCHES} microbatches of {LOOKUPS} lookups a rank and step, {num_rows} rows of 160 B"
    yield _row("rows of the node from its memory, against gloo", apart.waves / shared.waves, 1.5)
    yield _row("wire bytes, against distinct rows and ids (1 +- 0.02)", apart.wire_bytes / apart.unique_bytes, None)
    yield _row("wire bytes, against all lookups (at most 0.55)", apart.wire_bytes / apart.lookup_bytes, None)
    for name, times in (("one node", shared), ("two nodes", apart)):
        exposed = times.give_back + times.update
        yield (
            f"{name}: plan {times.plan * 1e3:.0f} ms, first wave {times.first_wave * 1e3:.0f}, all waves "
            f"{times.waves * 1e3:.0f}, return {times.give_back * 1e3:.0f}, update {times.update * 1e3:.0f}, all in "
            f"turn {times.in_turn * 1e3:.0f}; beside a sleep as long {times.beside * 1e3:.0f}"
        )
        yield _row(
            f"{name}: step, against sleep + return + update (at most 1.05)",
            times.beside / (times.in_turn + exposed),
            None,
        )


def max_of(times: list[StepTimes]) -> StepTimes:
    """The slowest rank's."""
    return max(times, key=lambda one: one.in_turn)


def _row(name: str, ratio: float, target: float | None) -> str:
    verdict = "" if target is None else f"  target {target:.2f}  {'ok' if ratio >= target else 'short'}"
    return f"{name:<70} {ratio:6.2f}{verdict}"
