"""Rows in host memory, and the refusal of tables that the host cannot hold."""

from pathlib import Path

import numpy as np
import pytest

from engram_kernels.row_state import row_bytes
from engram_megatron.errors import UsageError
from engram_megatron.tables.host_memory import available_bytes, cgroup_headrooms
from engram_megatron.tables.row_layout import RowLayout
from engram_megatron.tables.table_shard import TableShard

LAYOUT = RowLayout(total_rows=100, block_rows=8, num_shards=3)


def test_read_gives_the_rows_asked_for_in_their_order() -> None:
    shard = TableShard(LAYOUT, 1, 4)
    shard.initialize(seed=0, std=1.0)
    rows = np.array([5, 0, 31, 5])
    np.testing.assert_array_equal(shard.read(rows, None), shard.rows.weight[rows])
    assert shard.read(rows[:0], None).shape == (0, 4)


def test_read_is_a_copy_that_a_later_update_does_not_change() -> None:
    shard = TableShard(LAYOUT, 0, 4)
    before = shard.read(np.array([3]), None)
    shard.rows.weight[:] += 1
    assert (before == 0).all()


def test_read_outside_the_shard_raises() -> None:
    shard = TableShard(LAYOUT, 2, 4)
    with pytest.raises(IndexError):
        shard.read(np.array([shard.num_rows]), None)


def test_shard_of_a_layout_with_fewer_blocks_than_shards_is_empty() -> None:
    shard = TableShard(RowLayout(total_rows=10, block_rows=8, num_shards=3), 2, 4)
    shard.initialize(seed=0, std=1.0)
    assert shard.rows.weight.shape == (0, 4)


def test_table_larger_than_the_free_memory_is_refused_with_the_numbers() -> None:
    layout = RowLayout(total_rows=10**12, block_rows=4096, num_shards=4)
    with pytest.raises(UsageError, match=r"need 224\d{3}\.\d\d GiB .*; 1 of 4 shards .* GiB are free; use more hosts"):
        TableShard(layout, 0, 80)


def test_all_shards_of_the_host_count_against_its_memory() -> None:
    fits = available_bytes() // 2 // row_bytes(np.float32, 80)
    layout = RowLayout(total_rows=fits * 64, block_rows=1, num_shards=64)
    TableShard(layout, 0, 80)  # half of the free memory, not touched
    with pytest.raises(UsageError, match="64 of 64 shards"):
        TableShard(layout, 0, 80, shards_on_host=64)


def _group(folder: Path, files: dict[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)


def test_limit_of_an_outer_cgroup_v2_counts_and_its_page_cache_does_not(tmp_path: Path) -> None:
    _group(tmp_path / "job/step", {"memory.max": "max\n", "memory.current": "900\n"})
    _group(
        tmp_path / "job",
        {"memory.max": "1000\n", "memory.current": "950\n", "memory.stat": "anon 3\ninactive_file 200\n"},
    )
    assert cgroup_headrooms("0::/job/step\n", tmp_path) == [1000 - 950 + 200]


def test_limit_of_a_cgroup_v1_counts(tmp_path: Path) -> None:
    limits = {"memory.limit_in_bytes": "1000", "memory.usage_in_bytes": "400"}
    _group(tmp_path / "memory/slurm/job", limits)
    assert cgroup_headrooms("4:memory:/slurm/job\n2:cpu:/x\n", tmp_path) == [600]


def test_cgroup_path_of_the_host_seen_from_a_container_falls_back_to_the_mount(tmp_path: Path) -> None:
    _group(tmp_path, {"memory.max": "1000", "memory.current": "100"})
    assert cgroup_headrooms("0::/not/mounted/here\n", tmp_path) == [900]
