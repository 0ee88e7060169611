"""What a cluster is, and where its files lie: chosen by `up`, read by every later call."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from engram_megatron.errors import UsageError

CONTROLLER = "controller"
MUNGE = "munge"


@dataclass(frozen=True)
class Node:
    """One node. `shm_mib` is the size of its /dev/shm in MiB; None: half of the machine's memory, as Linux has it."""

    name: str
    address: str
    port: int  # of its slurmd
    shm_mib: int | None


@dataclass(frozen=True)
class ClusterSettings:
    """A cluster in `folder`. `plain_because` says why nodes are plain processes; None: they are namespaces."""

    folder: Path
    nodes: tuple[Node, ...]
    cpus_per_node: int
    plain_because: str | None
    controller_host: str  # the host name that slurmctld sees
    controller_address: str
    controller_port: int
    host_address: str  # of the machine itself, in the cluster's network

    @property
    def isolated(self) -> bool:
        return self.plain_because is None

    @property
    def slurm_conf(self) -> Path:
        return self.folder / "etc" / "slurm.conf"

    @property
    def hosts_file(self) -> Path:
        return self.folder / "etc" / "hosts"

    @property
    def munge_socket(self) -> Path:
        return self.folder / "munge" / "socket"

    @property
    def scratch(self) -> Path:
        """A node's own disk, at the same path in every node."""
        return self.folder / "scratch"

    @property
    def logs(self) -> Path:
        return self.folder / "log"

    def node(self, name: str) -> Node:
        """Raises UsageError where there is no such node."""
        for node in self.nodes:
            if node.name == name:
                return node
        raise UsageError(
            f"no node {name!r} in the cluster in {self.folder}; it has {self.nodes[0].name} to {self.nodes[-1].name}"
        )

    def save(self) -> None:
        fields = dataclasses.asdict(self) | {"folder": str(self.folder)}
        settings_file(self.folder).write_text(json.dumps(fields, indent=1) + "\n")


def settings_file(folder: Path) -> Path:
    return folder / "cluster.json"


def load_settings(folder: Path) -> ClusterSettings:
    """Raises UsageError where `folder` holds no cluster."""
    try:
        fields = json.loads(settings_file(folder).read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(f"no cluster in {folder}: start one with `local_cluster.py up --dir {folder}`") from None
    fields["nodes"] = tuple(Node(**node) for node in fields["nodes"])
    return ClusterSettings(**fields | {"folder": folder})
