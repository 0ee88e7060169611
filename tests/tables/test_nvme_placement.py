"""Folders, disks and memory that cannot hold tables on NVMe are refused before any work, with the numbers."""

from __future__ import annotations

from collections import namedtuple
from pathlib import Path

import pytest

from engram_megatron.config_tables import TablesConfig
from engram_megatron.errors import UsageError
from engram_megatron.tables.nvme_placement import NvmePlacement, file_system
from engram_megatron.tables.placement import placement_of
from engram_megatron.tables.row_layout import RowLayout
from engram_megatron.tables.row_store import RowFormat

LAYOUT = RowLayout(total_rows=10_000_000, block_rows=4096, num_shards=2)
FORMAT = RowFormat(80, "bfloat16")
GIB = 1024**3


def _check(folder: Path | str, touched_rows: int = 1000, **options: object) -> None:
    NvmePlacement(folder=str(folder), **options).check(LAYOUT, FORMAT, 2, touched_rows)  # type: ignore[arg-type]


def _free(monkeypatch: pytest.MonkeyPatch, *, disk: float = 1e6, memory: float = 1e6) -> None:
    """GiB that seem to be free."""
    usage = namedtuple("usage", "total used free")(0, 0, int(disk * GIB))
    monkeypatch.setattr("shutil.disk_usage", lambda _folder: usage)
    monkeypatch.setattr("engram_megatron.tables.nvme_placement.available_bytes", lambda: int(memory * GIB))


def test_folder_must_be_one(disk: Path) -> None:
    (disk / "file").touch()
    with pytest.raises(UsageError, match=r"tables\.nvme_dir = \S+/none does not exist; give a folder"):
        _check(disk / "none")
    with pytest.raises(UsageError, match=r"tables\.nvme_dir = \S+/file is not a folder; give a folder"):
        _check(disk / "file")


def test_folder_must_be_writable(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda _path, _mode: False)  # root may write anywhere
    with pytest.raises(UsageError, match=r"tables\.nvme_dir = \S+ cannot be written; give a folder"):
        _check(disk)


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no file system in memory here")
def test_file_system_in_memory_is_refused() -> None:
    assert file_system(Path("/dev/shm")) == "tmpfs"
    with pytest.raises(UsageError, match=r"tables\.nvme_dir = /dev/shm lies in memory \(tmpfs\)"):
        _check("/dev/shm")


def test_disk_must_hold_all_rows_or_those_that_a_lazy_run_updates(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = 10_000_000 * 80 * 12 / GIB  # 8.94
    _free(monkeypatch, disk=needed + 0.1)
    _check(disk)
    _free(monkeypatch, disk=needed - 0.1)
    told = r"need 8\.94 GiB on the disk of tables\.nvme_dir = \S+ here \(all rows of 80 columns, .* 960 bytes a row; 2 "
    with pytest.raises(
        UsageError, match=told + r"of 2 .*, 8\.84 GiB are free; use a larger disk .*tables\.commit=lazy"
    ):
        _check(disk)
    _check(disk, commit="lazy")
    _free(monkeypatch, disk=0.01)
    with pytest.raises(UsageError, match=r"need 0\.02 GiB .*the 1000 rows of each .*, 0\.01 GiB are free"):
        _check(disk, commit="lazy")


def test_memory_must_hold_the_hot_rows_and_the_index(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = (2_000_000 * (80 * 12 + 4 + 8 + 1) + 10_000_000 * 9) / GIB  # 1.90, where all rows take 8.98
    _free(monkeypatch, memory=needed + 0.01)
    _check(disk)
    _free(monkeypatch, memory=needed - 0.01)
    with pytest.raises(UsageError, match=r"need 1\.90 GiB of host memory .*hot_fraction = 0\.2.* 1\.89 GiB are free"):
        _check(disk)
    _check(disk, hot_fraction=0.1)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"placement": "nvme"}, r"tables\.placement = nvme needs tables\.nvme_dir=PATH"),
        ({"nvme_dir": "/data"}, r"tables\.nvme_dir = /data needs tables\.placement=nvme"),
        ({"hot_fraction": 0.0}, r"tables\.hot_fraction = 0\.0 must lie in \(0, 1\]"),
        ({"hot_fraction": 1.5}, r"tables\.hot_fraction = 1\.5 must lie in \(0, 1\]"),
        ({"hot_fraction": float("nan")}, r"tables\.hot_fraction = nan must lie in"),
    ],
)
def test_options_that_do_not_fit_together_are_refused(options: dict[str, object], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        TablesConfig(**options).validate(row_dim=80)  # type: ignore[arg-type]


def test_placement_is_that_of_the_config(disk: Path) -> None:
    tables = TablesConfig(placement="nvme", nvme_dir=str(disk), hot_fraction=0.5, commit="lazy", huge_pages="none")
    assert placement_of(tables) == NvmePlacement(folder=str(disk), hot_fraction=0.5, commit="lazy", huge_pages="none")
    assert tables.memory_bytes(1000, 80) == 500 * (80 * 12 + 4 + 8 + 1) + 1000 * 9
    assert tables.disk_bytes(1000, 80) == 1000 * 80 * 12
    assert TablesConfig().disk_bytes(1000, 80) == 0
