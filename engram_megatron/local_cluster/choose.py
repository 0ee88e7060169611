"""The settings of a new cluster: what the user asked for, and what this machine allows."""

from __future__ import annotations

import os
import random
import socket
from collections.abc import Sequence
from pathlib import Path

from engram_megatron.errors import UsageError
from engram_megatron.local_cluster.network import free_network, why_no_namespaces
from engram_megatron.local_cluster.settings import CONTROLLER, ClusterSettings, Node

SLURMCTLD_PORT, SLURMD_PORT = 6817, 6818
MAX_NODES = 200
# Unix sockets of slurmd and munge lie below the folder, and their paths are limited to 107 bytes.
MAX_FOLDER_BYTES = 60
PLAIN_PORTS = range(20000, 30000)  # below those that the kernel gives to outgoing connections


def choose_settings(
    folder: Path, nodes: int, cpus_per_node: int, shm_mib: Sequence[str], *, plain: bool
) -> ClusterSettings:
    """A cluster in `folder`, absolute.

    `shm_mib`: sizes of /dev/shm, `MIB` of all nodes or `NODE=MIB` of one. `plain`: plain processes even where
    namespaces are allowed. Raises UsageError for numbers that no cluster can have.
    """
    if not 1 <= nodes <= MAX_NODES:
        raise UsageError(f"--nodes {nodes}: a local cluster has 1 to {MAX_NODES}")
    if cpus_per_node < 1:
        raise UsageError(f"--cpus-per-node {cpus_per_node}: a node has at least one")
    if len(os.fsencode(folder)) > MAX_FOLDER_BYTES:
        raise UsageError(
            f"--dir {folder}: {len(str(folder))} bytes are too many for sockets below it; {MAX_FOLDER_BYTES} do"
        )
    names = [f"node{number}" for number in range(1, nodes + 1)]
    sizes = shm_sizes(names, shm_mib)
    because = "asked for" if plain else why_no_namespaces()
    if because is not None:
        return plain_settings(folder, sizes, cpus_per_node, because)
    network = free_network(folder)
    members = [Node(name, str(network[1 + i]), SLURMD_PORT, sizes[name]) for i, name in enumerate(names)]
    controller, host = str(network[-2]), str(network[-3])
    return ClusterSettings(folder, tuple(members), cpus_per_node, None, CONTROLLER, controller, SLURMCTLD_PORT, host)


def plain_settings(folder: Path, sizes: dict[str, int | None], cpus_per_node: int, because: str) -> ClusterSettings:
    """All on the machine's own address, each daemon on a port of its own. Raises UsageError for sizes of /dev/shm."""
    if any(size is not None for size in sizes.values()):
        raise UsageError(f"--shm-mib needs nodes in namespaces, and here they are plain processes: {because}")
    address = "127.0.0.1"
    ports = free_ports(len(sizes) + 1)
    members = [Node(name, address, port, None) for name, port in zip(sizes, ports[1:], strict=True)]
    host = socket.gethostname().partition(".")[0]
    return ClusterSettings(folder, tuple(members), cpus_per_node, because, host, address, ports[0], address)


def shm_sizes(names: Sequence[str], sizes: Sequence[str]) -> dict[str, int | None]:
    """MiB by node; None where nothing was said."""
    found: dict[str, int | None] = dict.fromkeys(names)
    for given in sorted(sizes, key=lambda text: "=" in text):  # first that of all, then those of single nodes
        name, _, number = given.rpartition("=")
        if not number.isdecimal() or int(number) < 1:
            raise UsageError(f"--shm-mib {given}: expected MIB or NODE=MIB, such as 1024 or node2=64")
        if name and name not in found:
            raise UsageError(f"--shm-mib {given}: there is no {name}; nodes are {names[0]} to {names[-1]}")
        found |= dict.fromkeys([name] if name else names, int(number))
    return found


def free_ports(count: int) -> list[int]:
    """Ports of the machine's own address that nobody listens on."""
    found: list[int] = []
    for port in random.sample(PLAIN_PORTS, len(PLAIN_PORTS)):
        with socket.socket() as tried:
            try:
                tried.bind(("127.0.0.1", port))
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            return found
    raise UsageError(f"{count} free ports are needed from {PLAIN_PORTS.start} to {PLAIN_PORTS.stop - 1}")
