"""Host memory: what the tables need, what the machine has free, and what this process's cgroups still allow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import psutil  # type: ignore[import-untyped]

from engram_kernels.row_state import row_bytes
from engram_megatron.config_fields import DType
from engram_megatron.errors import UsageError
from engram_megatron.tables.row_layout import RowLayout

GIB = 1024**3
LAST_STEP_BYTES = 4


PAGE_BYTES = 4096


def stored_dtype(dtype: DType) -> np.dtype[Any]:
    """How a table's weights are stored: the bits of bfloat16 as uint16."""
    return np.dtype(np.uint16 if dtype == "bfloat16" else dtype)


def touched_bytes(touched_rows: int, num_rows: int, row_dim: int, dtype: DType) -> int:
    """Host memory of `num_rows` rows of which `touched_rows` were ever updated, the others never written.

    Rows lie anywhere, so each takes whole pages of its own of every array, until all pages are taken.
    """
    stored = stored_dtype(dtype)
    weight_bytes = stored.itemsize * row_dim
    state_bytes = row_bytes(stored, row_dim) - weight_bytes - LAST_STEP_BYTES
    pages = 0
    for size in (weight_bytes, state_bytes, LAST_STEP_BYTES):
        per_row = 1 + -(-size // PAGE_BYTES)  # a row may lie across the border of two pages
        pages += min(touched_rows * per_row, -(-num_rows * size // PAGE_BYTES))
    return pages * PAGE_BYTES


def check_host_memory(
    layout: RowLayout, row_dim: int, dtype: DType, shards_on_host: int, touched_rows: int | None = None
) -> None:
    """Raise `UsageError` where this host has not enough free memory for `shards_on_host` shards of `layout`.

    `touched_rows`: of a shard whose memory is taken only as rows are updated, how many are expected to be; None: all
    memory is taken at the start.
    """
    # Shard 0 is never smaller than another: every rank judges its host by the same number.
    num_rows = layout.num_local_rows(0)
    if touched_rows is None:
        of_shard, kind = num_rows * row_bytes(stored_dtype(dtype), row_dim), "all rows"
        cure = "use more hosts, lower engram.rows_per_head or engram.memory_dim, or set tables.commit=lazy"
    else:
        of_shard = touched_bytes(min(touched_rows, num_rows), num_rows, row_dim, dtype)
        kind, cure = f"the {min(touched_rows, num_rows)} rows of each that are expected to be updated", "use more hosts"
    needed, free = shards_on_host * of_shard, available_bytes()
    if needed > free:
        raise UsageError(
            f"Engram tables need {needed / GIB:.2f} GiB of host memory here ({kind}; {shards_on_host} of "
            f"{layout.num_shards} shards of {layout.total_rows} rows x {row_dim} columns, {dtype} weights and two Adam "
            f"moments, {row_bytes(stored_dtype(dtype), row_dim)} bytes a row), {free / GIB:.2f} GiB are free; {cure}"
        )


def available_bytes() -> int:
    """Bytes that can be allocated now without swapping and without reaching a cgroup's limit (v1 or v2)."""
    free = int(psutil.virtual_memory().available)
    membership = Path("/proc/self/cgroup")
    if membership.is_file():
        free = min([free, *cgroup_headrooms(membership.read_text(), Path("/sys/fs/cgroup"))])
    return max(free, 0)


def cgroup_headrooms(membership: str, mount: Path) -> list[int]:
    """Limit minus use, in bytes, of every memory cgroup of this process that has a limit, own group and ancestors.

    `membership` is the text of /proc/self/cgroup, `mount` where the cgroup file system stands. Inside a container the
    listed path may not be mounted; its ancestors up to the mount (the container's own group) are looked at as well.
    """
    found = []
    for line in membership.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, limit_name, use_name, cache_name = mount, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            root, cache_name = mount / "memory", "total_inactive_file"
            limit_name, use_name = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        group = root / path.lstrip("/")
        for folder in [group, *group.parents][: len(group.relative_to(root).parts) + 1]:
            limit, use = _number(folder / limit_name), _number(folder / use_name)
            if limit is not None and use is not None:
                found.append(limit - use + _statistic(folder / "memory.stat", cache_name))
    return found


def _number(path: Path) -> int | None:
    """The integer in a cgroup file; None where there is no such file or no limit (`max`)."""
    if not path.is_file():
        return None
    text = path.read_text().strip()
    return int(text) if text.isdigit() else None


def _statistic(path: Path, name: str) -> int:
    """One value of a `memory.stat`; page cache counts as used there although it gives way at once."""
    if not path.is_file():
        return 0
    for line in path.read_text().splitlines():
        key, _, value = line.partition(" ")
        if key == name:
            return int(value)
    return 0
