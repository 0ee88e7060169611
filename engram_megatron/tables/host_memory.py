"""Host memory: what the tables need, what the machine has free, and what this process's cgroups still allow."""

from __future__ import annotations

from pathlib import Path

import psutil  # type: ignore[import-untyped]

from engram_megatron.config_fields import DTYPE_BYTES, DType
from engram_megatron.config_tables import LAST_STEP_BYTES, record_bytes, row_bytes
from engram_megatron.errors import UsageError
from engram_megatron.tables.row_layout import RowLayout

GIB = 1024**3
PAGE_BYTES = 4096


def touched_bytes(touched_rows: int, num_rows: int, row_dim: int, dtype: DType, moments: int = 2) -> int:
    """Host memory of `num_rows` rows of which `touched_rows` were ever updated, the others never written."""
    weight_bytes = DTYPE_BYTES[dtype] * row_dim
    state_bytes = record_bytes(row_dim, dtype, moments) - weight_bytes
    return sum(scattered_bytes(touched_rows, num_rows, size) for size in (weight_bytes, state_bytes, LAST_STEP_BYTES))


def scattered_bytes(count: int, num_pieces: int, size: int) -> int:
    """What `count` of `num_pieces` pieces of `size` bytes take in whole pages: they lie anywhere, so each takes pages
    of its own, until all pages are taken."""
    per_piece = 1 + -(-size // PAGE_BYTES)  # a piece may lie across the border of two pages
    return min(count * per_piece, -(-num_pieces * size // PAGE_BYTES)) * PAGE_BYTES


def check_host_memory(
    layout: RowLayout,
    row_dim: int,
    dtype: DType,
    shards_on_host: int,
    touched_rows: int | None = None,
    moments: int = 2,
) -> None:
    """Raise `UsageError` where this host has not enough free memory for `shards_on_host` shards of `layout`.

    `touched_rows`: of a shard whose memory is taken only as rows are updated, how many are expected to be; None: all
    memory is taken at the start.
    """
    # Shard 0 is never smaller than another: every rank judges its host by the same number.
    num_rows, of_row = layout.num_local_rows(0), row_bytes(row_dim, dtype, moments)
    if touched_rows is None:
        of_shard, kind = num_rows * of_row, "all rows"
        cure = (
            "use more hosts, lower engram.rows_per_head or engram.memory_dim, or set tables.placement=nvme or "
            "tables.commit=lazy"
        )
    else:
        of_shard = touched_bytes(min(touched_rows, num_rows), num_rows, row_dim, dtype, moments)
        kind = f"the {min(touched_rows, num_rows)} rows of each that are expected to be updated,"
        cure = "use more hosts, or set tables.placement=nvme"
    kept = "two Adam moments" if moments == 2 else "momentum"
    kind += f" of {row_dim} columns, {dtype} weights and {kept}, {of_row} bytes a row"
    check_room(layout, shards_on_host, of_shard, available_bytes(), place="of host memory", kind=kind, cure=cure)


def check_room(
    layout: RowLayout, shards_on_host: int, of_shard: int, free: int, *, place: str, kind: str, cure: str
) -> None:
    """Raise `UsageError` where `shards_on_host` shards of `of_shard` bytes need more than the `free` bytes of a
    `place`. `kind`: which rows of a shard, and what a row is; `cure`: what to change."""
    needed = shards_on_host * of_shard
    if needed > free:
        raise UsageError(
            f"Engram tables need {needed / GIB:.2f} GiB {place} here ({kind}; {shards_on_host} of {layout.num_shards} "
            f"shards of {layout.total_rows} rows), {free / GIB:.2f} GiB are free; {cure}"
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
