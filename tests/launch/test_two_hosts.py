"""torchrun on two hosts, as on a cluster: each in a network namespace of its own, a virtual cable between them."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from namespaces import ADDRESSES, run_in_namespaces
from ranks import free_port
from tiny_run import TINY, Start, run_starts, tiny_config, train_losses


@pytest.mark.slow
def test_torchrun_on_two_hosts_trains_as_two_ranks_of_one_host_do(tiny_corpus: Path, tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    torchrun += [f"--master-addr={ADDRESSES[0]}", f"--master-port={free_port()}"]
    run = [f"data.corpus={tiny_corpus}", f"run_dir={tmp_path}/hosts", "tables.ranks_per_node=1"]
    program = ["launch/train.py", "engram_tiny", *TINY, *run, "checkpoint.local_every_steps=3"]
    disks = [f"checkpoint.local_dir={tmp_path}/disk_{rank}" for rank in (0, 1)]
    first, second = run_in_namespaces(
        [[*torchrun, f"--node-rank={rank}", *program, disks[rank]] for rank in (0, 1)], [{}, {}]
    )
    assert first.count("run folder") == 1
    assert len(re.findall(rf"^saved {tmp_path}/disk_0/hosts-.* on the disks of 2 nodes$", first, re.MULTILINE)) == 1
    assert "step" not in second, "rank 1 prints what rank 0 does"
    run_starts([Start(tiny_config(tiny_corpus, tmp_path / "host"))])
    expected = train_losses(tmp_path / "host")
    assert list(expected) == [1, 2, 3, 4, 5, 6]
    # A rank has a whole host here and half of one there: float32 sums of more threads may round otherwise.
    assert train_losses(tmp_path / "hosts") == pytest.approx(expected, rel=1e-5)
