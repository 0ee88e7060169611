"""A model spread over two nodes, by Slurm, trains bit for bit as the same layout on one host, under torchrun."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from slurm_cluster import Cluster
from slurm_runs import Run
from tiny_run import backbone, tables, train_losses
from train_program import Program

from engram_megatron.training.heartbeat import read_heartbeats

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

STEPS = 12
RANKS_PER_NODE = 2
# Four blocks of table rows, one for each rank; an Engram layer on each stage.
OPTIONS = (
    *(f"training.num_steps={STEPS}", "checkpoint.every_steps=6", f"tables.ranks_per_node={RANKS_PER_NODE}"),
    *("model.num_layers=4", "engram.layer_numbers=2,3", "engram.hash_seed_ids=2,3", "model.attention.num_heads=4"),
)
JOB = (f"--ranks-per-node={RANKS_PER_NODE}", "--time=1:00:00", "--memory=100")


def _launcher() -> list[str]:
    """Python on four cores at most: a rank has one thread there, as on a node of two cores, and rounds as it does."""
    cores = sorted(os.sched_getaffinity(0))[: 2 * RANKS_PER_NODE]
    return ["taskset", "--cpu-list", ",".join(map(str, cores)), sys.executable]


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(("parallel.tensor=2", "parallel.pipeline=2", "parallel.expert=2"), id="stages over nodes"),
        pytest.param(("parallel.tensor=4", "parallel.expert=4"), id="tensors and experts over nodes"),
    ],
)
def test_layout_over_two_nodes_is_that_of_one_host(
    slurm_cluster: Cluster, tiny_corpus: Path, tmp_path: Path, layout: tuple[str, ...]
) -> None:
    run = Run(slurm_cluster, tmp_path / "nodes")
    run.submit(tiny_corpus, *OPTIONS, *layout, *JOB)
    run.wait_until_finished()
    nodes = run.events("started")[0].fields["nodes"]
    assert [beat.host for beat in read_heartbeats(run.path)] == [nodes[0], nodes[0], nodes[1], nodes[1]]

    with Program(tmp_path / "host", tiny_corpus, *OPTIONS, *layout, "--nproc-per-node=4", launcher=_launcher()) as host:
        ended = host.end()
    assert ended.code == 0, ended.output + ended.errors
    assert train_losses(run.path) == train_losses(tmp_path / "host")
    ours, theirs = (path / f"checkpoints/step_{STEPS:08d}" for path in (run.path, tmp_path / "host"))
    for name, values in tables(theirs).items():
        np.testing.assert_array_equal(tables(ours)[name], values, err_msg=name)
    weights, found = backbone(theirs), backbone(ours)
    assert [name for name, tensor in weights.items() if not torch.equal(found[name], tensor)] == []
