"""Numbers of nodes that a job may get: what the layout makes of each is known before it is queued."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_run import tiny_config

from engram_megatron.errors import UsageError
from engram_megatron.jobs.allocation import Allocation
from engram_megatron.jobs.batch_script import Job, sbatch_lines
from engram_megatron.jobs.node_counts import NodeCounts, node_counts
from engram_megatron.jobs.options import JobOptions

EXPERTS_ON_TWO_RANKS = ("training.global_batch_size=12", "training.micro_batch_size=1")


def _counts(least: int, most: int, *overrides: str, ranks: int = 1) -> NodeCounts:
    config = tiny_config(Path("corpus"), Path("run"), *EXPERTS_ON_TWO_RANKS, *overrides)
    return node_counts(config, JobOptions(nodes=most, min_nodes=least, ranks_per_node=ranks))


def test_numbers_between_that_do_not_fit_are_told_and_not_used() -> None:
    counts = _counts(2, 6)
    assert counts.usable == [2, 4, 6]
    assert [counts.of_given(nodes) for nodes in (2, 3, 4, 5, 6)] == [2, 2, 4, 4, 6]
    first, second = counts.lines()
    assert first.startswith("on 3 nodes 2 train: parallel: data * tensor * context = 3 * 1 * 1 = 3 is not ")
    assert second.startswith("on 5 nodes 4 train: ")
    assert _counts(1, 3, ranks=2).usable == [1, 2, 3]
    assert _counts(0, 4).usable == [4]


def test_batch_counts_as_the_experts_do() -> None:
    assert _counts(1, 12, "parallel.expert=1").usable == [1, 2, 3, 4, 6, 12]


@pytest.mark.parametrize(
    ("least", "most", "told"),
    [
        (3, 4, "--min-nodes 3: a job that gets no more could not train: parallel: data * tensor * context = 3 "),
        (2, 5, "parallel: data * tensor * context = 5 * 1 * 1 = "),
        (0, 5, "parallel: data * tensor * context = 5 * 1 * 1 = "),
    ],
)
def test_ends_that_cannot_be_are_refused(least: int, most: int, told: str) -> None:
    with pytest.raises(UsageError) as raised:
        _counts(least, most)
    assert str(raised.value).startswith(told)
    if least == 3:
        assert str(raised.value).endswith("from there up to --nodes 4 the layout fits 4")


def test_slurm_is_asked_for_a_range_only_where_fewer_do() -> None:
    def nodes_of(options: JobOptions) -> list[str]:
        job = Job(options=options, name="run", run_dir=Path("run"), code=Path("code"), python="python")
        return [line for line in sbatch_lines(job) if line.startswith(("--nodes", "--ntasks"))]

    assert nodes_of(JobOptions(nodes=4)) == ["--nodes=4", "--ntasks-per-node=1"]
    assert nodes_of(JobOptions(nodes=4, min_nodes=4)) == ["--nodes=4", "--ntasks-per-node=1"]
    assert nodes_of(JobOptions(nodes=4, min_nodes=2)) == ["--nodes=2-4"], "with tasks it would get two nodes"


def test_nodes_beyond_the_layout_stay_idle() -> None:
    given = Allocation("1", 0, ("n1", "n2", "n3"))
    used = given.first(2)
    assert used.tasks() == ["srun", "--nodes=2", "--nodelist=n1,n2", "--ntasks-per-node=1"]
    assert used.told(4) == {"nodes": ["n1", "n2"], "asked_for": 4, "idle": ["n3"]}
    assert given.first(3).told(3) == {"nodes": ["n1", "n2", "n3"]}
