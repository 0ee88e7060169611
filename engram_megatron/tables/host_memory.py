"""How much more memory this process may use: what the machine has free, and what its cgroups still allow."""

from __future__ import annotations

from pathlib import Path

import psutil  # type: ignore[import-untyped]


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
