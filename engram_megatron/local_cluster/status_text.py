"""A cluster as a user reads it."""

from __future__ import annotations

from engram_megatron.local_cluster.cluster import states
from engram_megatron.local_cluster.settings import ClusterSettings


def status_text(settings: ClusterSettings) -> str:
    """A line on the cluster, and one per node: switched on or off, Slurm's state, address, size of /dev/shm."""
    kind = "namespaces" if settings.isolated else f"plain processes ({settings.plain_because})"
    lines = [f"{len(settings.nodes)} nodes of {settings.cpus_per_node} CPUs as {kind}, in {settings.folder}"]
    for found in states(settings):
        size = "" if found.node.shm_mib is None else f"  /dev/shm {found.node.shm_mib} MiB"
        power = "on" if found.is_on else "off"
        lines.append(f"{found.node.name:8} {power:4} {found.slurm:12} {found.node.address}:{found.node.port}{size}")
    return "\n".join(lines)
