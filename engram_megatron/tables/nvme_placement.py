"""Rows on a local disk with the hot ones in memory: what that takes of a host, and what is refused before any work."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from engram_megatron.config_tables import INDEX_BYTES, hot_rows, nvme_memory_bytes, record_bytes
from engram_megatron.errors import UsageError
from engram_megatron.tables.host_memory import available_bytes, check_room, scattered_bytes
from engram_megatron.tables.node_memory import HugePages
from engram_megatron.tables.nvme_rows import NvmeRows
from engram_megatron.tables.row_layout import RowLayout
from engram_megatron.tables.row_store import Commit, RowFormat

IN_MEMORY = ("tmpfs", "ramfs")  # file systems that are no disk


@dataclass(frozen=True, kw_only=True)
class NvmePlacement:
    """In files in `folder`, and a share `hot_fraction` of the rows in the memory of the host."""

    folder: str
    hot_fraction: float = 0.2
    commit: Commit = "eager"
    huge_pages: HugePages = "none"

    def __str__(self) -> str:
        return f"{self.commit}, on NVMe"

    def check(self, layout: RowLayout, row_format: RowFormat, shards_on_host: int, touched_rows: int) -> None:
        """Raise `UsageError` where the folder, its disk or the memory do not do."""
        check_folder(self.folder)
        row_dim, dtype = row_format.row_dim, row_format.dtype
        num_rows = layout.num_local_rows(0)  # no shard is larger
        is_lazy = self.commit == "lazy"
        touched = min(num_rows, touched_rows) if is_lazy else num_rows
        num_hot = min(touched, hot_rows(num_rows, self.hot_fraction))
        check_room(
            layout,
            shards_on_host,
            nvme_memory_bytes(num_rows, num_hot, row_dim, dtype),
            available_bytes(),
            place="of host memory",
            kind=f"the hot rows, tables.hot_fraction = {self.hot_fraction:g}, and {INDEX_BYTES} bytes for each row",
            cure="use more hosts, or lower tables.hot_fraction",
        )
        record = record_bytes(row_dim, dtype)
        rows = f"the {touched} rows of each that are expected to be updated," if is_lazy else "all rows"
        check_room(
            layout,
            shards_on_host,
            scattered_bytes(touched, num_rows, record),
            shutil.disk_usage(self.folder).free,
            place=f"on the disk of tables.nvme_dir = {self.folder}",
            kind=f"{rows} of {row_dim} columns, {dtype} weights and two Adam moments, {record} bytes a row",
            cure="use a larger disk or more hosts" + ("" if is_lazy else ", or set tables.commit=lazy"),
        )

    def create(self, num_rows: int, row_format: RowFormat) -> NvmeRows:
        """Nothing is resident before it is written or `commit` is called."""
        num_hot = hot_rows(num_rows, self.hot_fraction)
        return NvmeRows.create(Path(self.folder), row_format, num_rows, num_hot, self.huge_pages)


def check_folder(folder: str) -> None:
    """Raise `UsageError` where files of tables cannot be made in `folder`, or would lie in memory."""
    problem = None
    if not Path(folder).is_dir():
        problem = "is not a folder" if Path(folder).exists() else "does not exist"
    elif not os.access(folder, os.W_OK | os.X_OK):
        problem = "cannot be written"
    elif file_system(Path(folder)) in IN_MEMORY:
        problem = f"lies in memory ({file_system(Path(folder))})"
    if problem is not None:
        raise UsageError(
            f"tables.nvme_dir = {folder} {problem}; give a folder that can be written on a local disk of every host"
        )


def file_system(folder: Path) -> str:
    """The type of the file system of `folder`, as the kernel names it; empty where it does not say."""
    device = folder.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        mount, _, source = line.partition(" - ")
        if mount.split()[2] == number:
            return source.split()[0]
    return ""
