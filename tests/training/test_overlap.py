"""The thread of the tables changes when things happen, never what: bit-identical losses and rows; a race is seen."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import numpy as np
import pytest
from ranks import run_ranks
from small_run import build_small_run, finished_table, global_batch, microbatches, small_run_config

STEPS = 4


class Case(NamedTuple):
    """`slow_update_s`: time that the last rank's updates take. `barriers`: do ranks of a node wait for one another?"""

    ranks_per_node: int
    overlap: bool
    slow_update_s: float = 0.0
    barriers: bool = True
    ahead: bool = True
    waves: int = 2


def _train(rank: int, world_size: int, case: Case) -> tuple[list[float], np.ndarray[Any, Any]]:
    overrides = [
        f"tables.ranks_per_node={case.ranks_per_node}",
        f"tables.overlap={str(case.overlap).lower()}",
        f"tables.waves={case.waves}",
    ]
    run = build_small_run(small_run_config("float32", overrides), rank, world_size)
    adam_step = run.memory.optimizer.step

    def slow_step(*arguments: Any) -> None:
        if rank == world_size - 1:
            time.sleep(case.slow_update_s)
        adam_step(*arguments)

    run.memory.optimizer.step = slow_step
    if not case.barriers:
        type(run.memory.lookup.groups).node_barrier = lambda groups: None
    losses = []
    batches = [microbatches(global_batch(step), run.ranks.data_rank, run.ranks.data_ranks) for step in range(STEPS)]
    for step in range(STEPS):
        upcoming = batches[step + 1] if case.ahead and step + 1 < STEPS else None
        result = run.trainer.train_step(step, batches[step], stop_requested=False, next_batches=upcoming)
        losses.append(result.loss)
    return losses, finished_table(run.memory)


def _outcome(case: Case, world_size: int = 2) -> tuple[list[float], list[np.ndarray[Any, Any]]]:
    of_ranks = run_ranks(_train, world_size, case)
    return of_ranks[0][0], [table for _, table in of_ranks]


def _same(first: Any, second: Any) -> bool:
    return first[0] == second[0] and all(map(np.array_equal, first[1], second[1]))


@pytest.mark.parametrize("ranks_per_node", [1, 2])
def test_beside_the_model_or_in_turn_ahead_or_not_numbers_are_the_same(ranks_per_node: int) -> None:
    in_turn = _outcome(Case(ranks_per_node, overlap=False, ahead=False))
    assert _same(_outcome(Case(ranks_per_node, overlap=True)), in_turn)
    assert _same(_outcome(Case(ranks_per_node, overlap=True, waves=1)), in_turn)
    assert _same(_outcome(Case(ranks_per_node, overlap=False)), in_turn)


def test_no_rank_reads_rows_of_its_node_before_they_are_updated() -> None:
    """One rank's updates take long. The other one must wait for them; planted without barriers, it does not, and the
    comparison sees it."""
    in_turn = _outcome(Case(2, overlap=False, ahead=False))
    assert _same(_outcome(Case(2, overlap=True, slow_update_s=0.3)), in_turn)
    assert not _same(_outcome(Case(2, overlap=True, slow_update_s=0.3, barriers=False)), in_turn), "the race is unseen"


def test_no_rank_gets_rows_of_another_node_before_they_are_updated() -> None:
    in_turn = _outcome(Case(1, overlap=False, ahead=False))
    assert _same(_outcome(Case(1, overlap=True, slow_update_s=0.3)), in_turn)
