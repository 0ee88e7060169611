"""Host memory: what the tables need, what the machine has free, and what this process's cgroups still allow."""

from __future__ import annotations

from pathlib import Path

import psutil  # type: ignore[import-untyped]

from engram_megatron.errors import UsageError
from engram_megatron.tables.row_layout import RowLayout

GIB = 1024**3


def shard_bytes(num_rows: int, row_dim: int, itemsize: int) -> int:
    """Host memory of `num_rows` rows: weight, two moments, touched flag."""
    return num_rows * (3 * row_dim * itemsize + 1)


def check_host_memory(layout: RowLayout, row_dim: int, itemsize: int, shards_on_host: int) -> None:
    """Raise `UsageError` where this host has not enough free memory for `shards_on_host` shards of `layout`."""
    # Shard 0 is never smaller than another: every rank judges its host by the same number.
    needed = shards_on_host * shard_bytes(layout.num_local_rows(0), row_dim, itemsize)
    free = available_bytes()
    if needed > free:
        raise UsageError(
            f"Engram tables need {needed / GIB:.2f} GiB of host memory here ({shards_on_host} of {layout.num_shards} "
            f"shards of {layout.total_rows} rows x {row_dim} columns, weight and two Adam moments of {itemsize} bytes "
            f"each), {free / GIB:.2f} GiB are free; use more hosts, or lower engram.rows_per_head or engram.memory_dim"
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
