"""A machine of the cluster, the controller or a node: switched on, switched off, and entered."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from engram_megatron.errors import UsageError
from engram_megatron.local_cluster import network, processes
from engram_megatron.local_cluster.processes import Process
from engram_megatron.local_cluster.programs import search_path
from engram_megatron.local_cluster.settings import CONTROLLER, ClusterSettings, Node

NAMESPACES = ("--net", "--uts", "--ipc", "--mount", "--pid")
UNSHARE = ("unshare", *NAMESPACES, "--fork", "--kill-child", "--mount-proc", "--propagation", "private")
END_TIMEOUT_S = 10.0
START_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class MachineStart:
    """What `machine_main.py` is told. `cores`: where its processes may run. `disk` is the folder that the machine
    sees at the path `scratch`."""

    isolated: bool
    cores: Sequence[int]
    hostname: str
    shm_mib: int | None
    hosts_file: str
    disk: str
    scratch: str
    daemon: Sequence[str]


def start_controller(settings: ClusterSettings) -> None:
    """Switch on the machine of slurmctld, to whose bridge all others are joined."""
    pid, go = _start(settings, CONTROLLER, None, sorted(os.sched_getaffinity(0)), ["slurmctld", "-D"])
    with go:
        if settings.isolated:
            network.make_bridge(settings, pid)
        go.write(b"go\n")


def start_node(settings: ClusterSettings, node: Node, *, rebooted: bool = False) -> None:
    """Switch on a node. `rebooted`: its slurmd says that the node was off, so its jobs are gone."""
    daemon = ["slurmd", "-D", "-N", node.name, *(["-b"] if rebooted else [])]
    pid, go = _start(settings, node.name, node.shm_mib, cores_of(settings, node), daemon)
    with go:
        if settings.isolated:
            network.join_bridge(settings, node, pid, _pid_inside(settings, CONTROLLER))
        go.write(b"go\n")


def cores_of(settings: ClusterSettings, node: Node) -> list[int]:
    """As many of this machine's cores as the node claims, or all of fewer; nodes share them in turn."""
    cores, number = sorted(os.sched_getaffinity(0)), settings.nodes.index(node) * settings.cpus_per_node
    return sorted({cores[(number + cpu) % len(cores)] for cpu in range(settings.cpus_per_node)})


def power_off(settings: ClusterSettings, name: str) -> None:
    """End all processes of a machine at once."""
    keeper = keeper_of(settings, name)
    if keeper is None:
        return
    first = keeper.first_child() if settings.isolated else None
    if first is not None:
        first.kill()  # the kernel ends its namespace with it, and it has ended only when all the others have
        first.wait_ended(END_TIMEOUT_S)
    if not settings.isolated:
        keeper.kill_descendants()
    keeper.kill()
    keeper.wait_ended(END_TIMEOUT_S)


def is_on(settings: ClusterSettings, name: str) -> bool:
    return keeper_of(settings, name) is not None


def keeper_of(settings: ClusterSettings, name: str) -> Process | None:
    """The process that a machine ends with: of `unshare`, or of `machine_main.py` where there are no namespaces."""
    return processes.recorded(record_file(settings.folder, name))


def record_file(folder: Path, name: str) -> Path:
    return folder / "processes" / name


def command_inside(settings: ClusterSettings, name: str, command: Sequence[str]) -> list[str]:
    """`command` as it is run inside a machine. Raises UsageError where that is off."""
    if not is_on(settings, name):
        raise UsageError(f"{name} is off: `boot {name}` first")
    if not settings.isolated:
        return ["env", f"SLURMD_NODENAME={name}", *command]
    return ["nsenter", "--target", str(_pid_inside(settings, name)), *NAMESPACES, f"--wd={os.getcwd()}", "--", *command]


def daemon_environment(settings: ClusterSettings) -> dict[str, str]:
    """Of a machine that nobody has logged in to."""
    return {"PATH": search_path(), "SLURM_CONF": str(settings.slurm_conf), "LANG": "C.UTF-8"}


def _start(
    settings: ClusterSettings, name: str, shm_mib: int | None, cores: Sequence[int], daemon: Sequence[str]
) -> tuple[int, IO[bytes]]:
    """A machine that waits for its network, then for a line: its first process's id, and where to write the line."""
    disk = settings.folder / "disks" / name
    disk.mkdir(mode=0o1777, parents=True, exist_ok=True)
    hostname = settings.controller_host if name == CONTROLLER else name
    hosts = str(settings.hosts_file)
    told = MachineStart(settings.isolated, cores, hostname, shm_mib, hosts, str(disk), str(settings.scratch), daemon)
    main = [sys.executable, "-I", "-S", str(Path(__file__).with_name("machine_main.py")), json.dumps(asdict(told))]
    keeper, go = processes.start(
        [*(UNSHARE if settings.isolated else ()), *main],
        settings.logs / f"{name}.out",
        daemon_environment(settings),
        record_file(settings.folder, name),
    )
    return (_pid_inside(settings, name) if settings.isolated else keeper.pid), go


def _pid_inside(settings: ClusterSettings, name: str) -> int:
    """Process 1 of a machine in namespaces, by its id outside."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        keeper = keeper_of(settings, name)
        if keeper is None:
            break
        first = keeper.first_child()
        if first is not None:
            return first.pid
        time.sleep(processes.POLL_S)
    raise UsageError(f"{name} does not start: see {settings.logs / name}.out")
