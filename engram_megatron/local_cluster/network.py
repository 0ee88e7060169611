"""The network of a cluster: a bridge in the controller's namespace, with a cable to every node and one to the machine.

It has no way out, and the machine's own filters (Docker's) do not see what nodes send to each other.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from engram_megatron.errors import UsageError
from engram_megatron.local_cluster.programs import search_path
from engram_megatron.local_cluster.settings import ClusterSettings, Node

BRIDGE = "nodes"
INTERFACE = "eth0"  # of a node
NETWORKS = ipaddress.IPv4Network("198.18.0.0/15")  # set aside for experiments: the least likely to be in use (RFC 2544)
PREFIX = 24
TRIAL = (
    "mount -t tmpfs tmpfs /dev/shm && mount -t sysfs sysfs /sys"
    " && ip link add tried type bridge && ip link add eth0 type veth peer name eth1"
)


def why_no_namespaces() -> str | None:
    """None where nodes can be namespaces: found by making some and forgetting them."""
    if os.geteuid() != 0:
        return "not root"
    made = subprocess.run(
        ["unshare", "--net", "--uts", "--ipc", "--mount", "--pid", "--fork", "--mount-proc", "sh", "-c", TRIAL],
        env={"PATH": search_path(), "LC_ALL": "C"},
        capture_output=True,
        text=True,
        check=False,
    )
    return None if made.returncode == 0 else " ".join(made.stderr.split()) or f"unshare ended with {made.returncode}"


def free_network(folder: Path) -> ipaddress.IPv4Network:
    """A network that no interface of this machine is in. Raises UsageError where all are taken."""
    shown = _run(["ip", "-json", "-4", "address", "show"])
    used = [
        ipaddress.IPv4Network(f"{address['local']}/{address['prefixlen']}", strict=False)
        for interface in json.loads(shown)
        for address in interface["addr_info"]
    ]
    networks = list(NETWORKS.subnets(new_prefix=PREFIX))
    first = int(_fingerprint(folder), 16) % len(networks)  # two clusters that start together take different ones
    for network in networks[first:] + networks[:first]:
        if not any(network.overlaps(other) for other in used):
            return network
    raise UsageError(f"every network in {NETWORKS} is in use on this machine: bring one of its clusters down")


def make_bridge(settings: ClusterSettings, controller: int) -> None:
    """The bridge in the namespace of process `controller`, joined to the machine itself."""
    host = host_interface(settings.folder)
    remove_host_interface(settings.folder)
    _inside(
        controller,
        "link set lo up",
        f"link add {BRIDGE} type bridge",
        f"address add {settings.controller_address}/{PREFIX} dev {BRIDGE}",
        f"link set {BRIDGE} up",
    )
    _run(["ip", "link", "add", host, "type", "veth", "peer", "name", "host", "netns", str(controller)])
    _inside(controller, f"link set host master {BRIDGE} up")
    _run(["ip", "address", "add", f"{settings.host_address}/{PREFIX}", "dev", host])
    _run(["ip", "link", "set", host, "up"])


def join_bridge(settings: ClusterSettings, node: Node, inside: int, controller: int) -> None:
    """A cable from the namespace of process `inside`, a node's, to the bridge in that of `controller`."""
    cable = ["ip", "link", "add", INTERFACE, "netns", str(inside)]
    _run([*cable, "type", "veth", "peer", "name", node.name, "netns", str(controller)])
    _inside(controller, f"link set {node.name} master {BRIDGE} up")
    _inside(
        inside, "link set lo up", f"address add {node.address}/{PREFIX} dev {INTERFACE}", f"link set {INTERFACE} up"
    )


def remove_host_interface(folder: Path) -> None:
    """It goes with the controller's namespace as well, a moment later. Nothing where it is gone."""
    if shutil.which("ip", path=search_path()) is not None and Path(f"/sys/class/net/{host_interface(folder)}").exists():
        subprocess.run(["ip", "link", "delete", host_interface(folder)], capture_output=True, check=False)


def host_interface(folder: Path) -> str:
    """Of the machine itself: named after the cluster's folder, so that it is nobody else's."""
    return f"engram{_fingerprint(folder)}"


def _fingerprint(folder: Path) -> str:
    return hashlib.sha256(str(folder).encode()).hexdigest()[:8]


def _inside(pid: int, *commands: str) -> None:
    """Run commands of `ip` in the network of process `pid`."""
    _run(["nsenter", "--target", str(pid), "--net", "ip", "-batch", "-"], "\n".join(commands) + "\n")


def _run(command: Sequence[str], text: str | None = None) -> str:
    done = subprocess.run(command, input=text, env={"PATH": search_path()}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr.strip()}"
    return done.stdout
