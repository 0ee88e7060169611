"""Rows in files with the hot ones in memory are the rows of `HostRows`, bit for bit, whatever moves where."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import run_ranks
from sharded_tables import Tables, sharded_tables

from engram_kernels.catch_up import CatchUp
from engram_megatron import platform
from engram_megatron.optimizer.row_adam import RowAdam
from engram_megatron.tables import nvme_rows
from engram_megatron.tables.host_rows import HostPlacement
from engram_megatron.tables.nvme_placement import NvmePlacement
from engram_megatron.tables.row_gradients import RowGradients
from engram_megatron.tables.row_layout import RowLayout
from engram_megatron.tables.row_store import Placement
from engram_megatron.tables.table_shard import TableShard

ROWS, DIM, BLOCK_ROWS, STEPS = 230, 6, 16, 40  # the last block is short
LR, SCALE = 0.02, 0.25


def _ids(step: int, rank: int) -> np.ndarray:
    """[2 microbatches, 24], zipf-like over two thirds of the rows, which change every five steps; sometimes none;
    sometimes half of all rows, so that all are moved."""
    rng = np.random.default_rng(100 * step + rank)
    if step % 8 == 3:
        return rng.choice(ROWS, (2, ROWS // 4), replace=False)
    used = 2 * ROWS // 3
    ranked = np.minimum(rng.zipf(1.3, (0 if step % 9 == 5 else 2, 24)), used) - 1
    return (ranked * 37 % used + step // 5 % 3 * 40) % ROWS


def _trained(rank: int, world_size: int, settings: list[dict[str, Any]]) -> list[list[dict[str, np.ndarray]]]:
    platform.limit_threads(1)  # or waking threads for a few rows takes most of the time
    nvme_rows.ROWS_AT_ONCE = 50  # or one copy would hold the whole table
    return [_train(rank, world_size, Tables(rows=ROWS, row_dim=DIM, block_rows=BLOCK_ROWS, **s)) for s in settings]


def _train(rank: int, world_size: int, tables: Tables) -> list[dict[str, np.ndarray]]:
    """What the model reads in every step, and all that a save would write, every seventh step."""
    lookup, adam = sharded_tables(tables, rank, world_size)
    shard, history = lookup.shard, []
    everything = np.arange(shard.num_rows)
    for step in range(STEPS):
        rows = lookup.read(_ids(step, rank))
        memory = [rows.expand(microbatch) for microbatch in range(len(_ids(step, rank)))]
        for one in memory:
            ((one.float() if tables.dtype == "bfloat16" else one) - 10.0).square().sum().backward()
        seen = {"read": torch.stack(memory).detach().double().numpy()} if memory else {}
        adam.step(lookup.return_gradients(rows), LR, SCALE)
        if step % 7 == 0:
            saved = shard.exact(everything)
            seen |= {"weight": saved.weight, "state": saved.state, "last_step": saved.last_step}
            seen["finished"] = shard.finished_masters(everything, adam.read_as_of)
            seen["touched"] = np.array(shard.touched_rows)
        history.append(seen)
    return history


@pytest.mark.parametrize(("world_size", "ranks_per_node"), [(1, 1), (2, 2), pytest.param(2, 1, marks=pytest.mark.slow)])
def test_every_read_and_all_rows_are_those_in_memory(world_size: int, ranks_per_node: int, disk: Path) -> None:
    """hot_fraction 0.02 keeps one to five rows of a shard: rows come and go within one update. 0.3 evicts often."""
    settings: list[dict[str, Any]] = []
    for dtype in ("float32", "bfloat16", "float64"):
        for touched_only in (False, True):
            common = {"dtype": dtype, "touched_only": touched_only, "ranks_per_node": ranks_per_node, "num_waves": 2}
            placements: list[Placement] = [HostPlacement()]
            placements += [NvmePlacement(folder=str(disk), hot_fraction=share) for share in (0.02, 0.3)]
            settings += [common | {"placement": placement} for placement in placements]
    settings[1]["placement"] = NvmePlacement(folder=str(disk), hot_fraction=0.02, commit="lazy")
    for of_rank in run_ranks(_trained, world_size, settings):
        for first in range(0, len(settings), 3):
            for other in (first + 1, first + 2):
                for expected, found in zip(of_rank[first], of_rank[other], strict=True):
                    assert expected.keys() == found.keys()
                    for name in expected:
                        np.testing.assert_array_equal(found[name], expected[name], err_msg=name, strict=True)
    assert list(disk.iterdir()) == []


def _adam(placement: Placement, num_rows: int = 1000) -> RowAdam:
    shard = TableShard(RowLayout(num_rows, 64, 1), 0, DIM, placement=placement)
    shard.initialize(seed=3, std=1.0)
    return RowAdam(shard, CatchUp(0.9, 0.95, 1e-20))


def _step(adam: RowAdam, rows: np.ndarray) -> None:
    adam.step(RowGradients.summed(rows, [np.ones((rows.size, DIM), np.float32)]), LR)


def test_rows_that_are_used_often_stay_in_memory(disk: Path) -> None:
    adam = _adam(NvmePlacement(folder=str(disk), hot_fraction=0.1))
    hot, rng = np.arange(0, 500, 10), np.random.default_rng(0)
    for _ in range(40):
        _step(adam, np.union1d(hot, rng.choice(1000, 40, replace=False)))
    place_of = adam.shard.store.place_of  # type: ignore[attr-defined]
    assert (place_of[hot] > 0).mean() > 0.9
    assert np.count_nonzero(place_of) == 100


def test_memory_holds_the_hot_rows_and_an_index_and_the_file_what_was_updated(disk: Path) -> None:
    rows = 1 << 20
    adam = _adam(NvmePlacement(folder=str(disk), hot_fraction=1e-4, commit="lazy"), rows)
    _step(adam, np.arange(0, rows, 1024))
    assert adam.shard.touched_rows == 1024
    record = DIM * 12
    hot = -(-rows // 10_000) * (record + 4 + 8 + 1)
    assert adam.shard.memory.resident_bytes() < hot + rows * 9 + 8 * 4096  # eight arrays, in whole pages
    on_disk = adam.shard.store.file.memory.resident_bytes()  # type: ignore[attr-defined]
    assert 0 < on_disk <= 2 * 1024 * 4096 < rows * record


def test_eager_takes_the_disk_space_at_the_start(disk: Path) -> None:
    adam = _adam(NvmePlacement(folder=str(disk)), 50_000)
    assert adam.shard.store.file.memory.resident_bytes() >= 50_000 * DIM * 12  # type: ignore[attr-defined]
    assert adam.shard.memory.resident_bytes() >= 50_000 * 9


def test_killed_process_leaves_nothing_on_the_disk(disk: Path) -> None:
    code = (
        "import os, signal, sys, numpy as np\n"
        "from engram_megatron.tables.nvme_placement import NvmePlacement\n"
        "from engram_megatron.tables.row_layout import RowLayout\n"
        "from engram_megatron.tables.table_shard import TableShard\n"
        "shard = TableShard(RowLayout(1000, 64, 1), 0, 6, placement=NvmePlacement(folder=sys.argv[1]))\n"
        "shard.initialize(0, 1.0)\n"
        "print(len(os.listdir(sys.argv[1])), flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    command = [sys.executable, "-c", code, str(disk)]
    killed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (killed.returncode, killed.stdout.strip()) == (-signal.SIGKILL, "0"), killed.stderr
    assert list(disk.iterdir()) == []


def test_copy_beside_an_update_has_rows_that_are_on_their_way_to_the_file(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that make room for the rows of the update, and are not changed by it."""
    adam = _adam(NvmePlacement(folder=str(disk), hot_fraction=0.01))  # ten rows
    leaving = np.arange(10)
    _step(adam, leaving)
    store: Any = adam.shard.store
    before, copy = store.exact(leaving), store.format.empty(10)
    save, copying = store.file.save, threading.Thread(target=lambda: store.copy_to(leaving, copy, leaving))

    def save_slowly(*arguments: Any) -> None:
        copying.start()
        copying.join(timeout=0.2)
        save(*arguments)

    monkeypatch.setattr(store.file, "save", save_slowly)
    _step(adam, np.arange(10, 20))
    copying.join()
    assert not store.place_of[leaving].any()
    np.testing.assert_array_equal(copy.exact().weight, before.weight)
    np.testing.assert_array_equal(copy.exact().state, before.state)


def test_row_outside_the_shard_raises(disk: Path) -> None:
    adam = _adam(NvmePlacement(folder=str(disk)))
    for row in (-1, 1000):
        with pytest.raises(IndexError):
            adam.shard.store.read(np.array([row]), None, np.empty((1, DIM), np.float32), None)


def test_shard_without_rows_takes_a_step(disk: Path) -> None:
    shard = TableShard(RowLayout(10, 10, 2), 1, DIM, placement=NvmePlacement(folder=str(disk)))
    shard.initialize(0, 1.0)
    adam = RowAdam(shard, CatchUp(0.9, 0.95, 1e-20))
    _step(adam, np.empty(0, np.int64))
    assert adam.catch_up.step == 1
    assert adam.shard.finished(None).shape == (0, DIM)


def test_disk_that_fills_up_meanwhile_is_told(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adam = _adam(NvmePlacement(folder=str(disk), hot_fraction=0.01, commit="lazy"))
    _step(adam, np.arange(10))
    status = os.statvfs(disk)
    full = os.statvfs_result([*status[:3], 0, 0, *status[5:]])
    monkeypatch.setattr("os.fstatvfs", lambda _descriptor: full)
    with pytest.raises(OSError, match=r"the disk of tables\.nvme_dir is full: 10 rows .* 0\.000 GiB are free"):
        _step(adam, np.arange(10, 20))
