"""A cluster as a whole: up, down, the state of its nodes, and single nodes switched off and on."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import stat
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from engram_megatron.errors import UsageError
from engram_megatron.local_cluster import machine, network, processes, slurm_client
from engram_megatron.local_cluster.choose import choose_settings
from engram_megatron.local_cluster.configuration import write_configuration
from engram_megatron.local_cluster.programs import require_programs
from engram_megatron.local_cluster.settings import (
    CONTROLLER,
    MUNGE,
    ClusterSettings,
    Node,
    load_settings,
    settings_file,
)

READY_TIMEOUT_S = 60.0
READY = "ready"  # an empty file: `up` has come to its end
OWN = ("etc", "log", "munge", "state", "spool", "disks", "processes", "scratch", "cluster.json", READY)


@dataclass(frozen=True)
class NodeState:
    node: Node
    is_on: bool
    slurm: str  # Slurm's own word


def default_folder() -> Path:
    return Path(tempfile.gettempdir()) / f"engram-cluster-{os.geteuid()}"


def up(
    folder: Path, nodes: int = 4, cpus_per_node: int = 2, shm_mib: Sequence[str] = (), *, plain: bool = False
) -> ClusterSettings:
    """Start a cluster in `folder` and wait until every node can be used. Arguments are those of `choose_settings`.

    What an `up` that was killed has left in the folder is removed first. Raises UsageError where programs are missing,
    where the folder is somebody's else, or where a cluster is up in it.
    """
    require_programs()
    folder.mkdir(mode=0o755, parents=True, exist_ok=True)
    with _locked(folder):
        if (folder / READY).exists() and machine.is_on(load_settings(folder), CONTROLLER):
            raise UsageError(f"a cluster is up in {folder} already: `down` first, or give another --dir")
        _remove(folder)
        if any(folder.iterdir()):
            raise UsageError(f"{folder} holds files that are not a cluster's: give another --dir")
        settings = choose_settings(folder, nodes, cpus_per_node, shm_mib, plain=plain)
        try:
            _start(settings)
            (folder / READY).touch()
        except BaseException:
            _stop(settings)
            raise
        return settings


def down(folder: Path) -> None:
    """End everything that runs in a cluster, and remove its folder. Raises UsageError where there is none."""
    load_settings(folder)
    with _locked(folder):
        _remove(folder)
    with contextlib.suppress(OSError):
        folder.rmdir()


def states(settings: ClusterSettings) -> list[NodeState]:
    said = slurm_client.node_states(settings)
    return [
        NodeState(node, machine.is_on(settings, node.name), said.get(node.name, "unknown")) for node in settings.nodes
    ]


def crash(settings: ClusterSettings, name: str) -> None:
    """Power a node off: all its processes end at once. Slurm finds out by itself. Raises UsageError where it is off."""
    node = settings.node(name)
    with _locked(settings.folder):
        if not machine.is_on(settings, node.name):
            raise UsageError(f"{name} is off already")
        machine.power_off(settings, node.name)


def boot(settings: ClusterSettings, name: str) -> None:
    """Switch a node on again, and wait until Slurm can use it. Raises UsageError where it is on."""
    node = settings.node(name)
    with _locked(settings.folder):
        if machine.is_on(settings, node.name):
            raise UsageError(f"{name} is on already")
        started = time.strftime("%Y-%m-%dT%H:%M:%S")
        machine.start_node(settings, node, rebooted=True)

        def is_back() -> bool:
            if slurm_client.slurmd_started(settings, name) < started:
                return False
            if slurm_client.node_states(settings).get(name) in slurm_client.USABLE:
                return True
            slurm_client.resume_node(settings, name)  # Slurm leaves a node down that has rebooted without being asked
            return False

        _expect(slurm_client.wait_until(is_back, READY_TIMEOUT_S), settings, name)


def _start(settings: ClusterSettings) -> None:
    settings.save()
    write_configuration(settings)
    _start_munge(settings)
    machine.start_controller(settings)
    answers = slurm_client.wait_until(lambda: slurm_client.controller_answers(settings), READY_TIMEOUT_S)
    _expect(answers, settings, CONTROLLER)
    for node in settings.nodes:
        machine.start_node(settings, node)

    def all_usable() -> bool:
        found = slurm_client.node_states(settings)
        return all(found.get(node.name) in slurm_client.USABLE for node in settings.nodes)

    _expect(slurm_client.wait_until(all_usable, READY_TIMEOUT_S), settings, "a node")


def _start_munge(settings: ClusterSettings) -> None:
    """munged, which signs what Slurm's programs say to each other. All machines share its socket, a file."""
    folder = settings.munge_socket.parent
    command = ["munged", "--foreground", "--force", f"--socket={settings.munge_socket}", f"--key-file={folder}/key"]
    command += [f"--pid-file={folder}/pid", f"--seed-file={folder}/seed", f"--log-file={settings.logs}/munged.log"]
    record = machine.record_file(settings.folder, MUNGE)
    _, stdin = processes.start(command, settings.logs / "munged.out", machine.daemon_environment(settings), record)
    stdin.close()
    _expect(slurm_client.wait_until(settings.munge_socket.exists, READY_TIMEOUT_S), settings, MUNGE)


def _stop(settings: ClusterSettings) -> None:
    """End all machines and munged; slurmctld's last, since it would wait for nodes that have gone."""
    for name in [*(node.name for node in settings.nodes), CONTROLLER]:
        machine.power_off(settings, name)
    network.remove_host_interface(settings.folder)
    munge = processes.recorded(machine.record_file(settings.folder, MUNGE))
    if munge is not None:
        munge.kill(signal.SIGTERM)
        if not munge.wait_ended(machine.END_TIMEOUT_S):
            munge.kill()


def _remove(folder: Path) -> None:
    """Whatever of a cluster is in `folder`, running or left by an `up` that was killed."""
    if settings_file(folder).exists():
        _stop(load_settings(folder))
    for name in OWN:
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _expect(happened: bool, settings: ClusterSettings, what: str) -> None:
    if not happened:
        raise UsageError(f"{what} was not ready after {READY_TIMEOUT_S:g} s: see the logs in {settings.logs}")


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Nobody else changes the cluster in `folder` meanwhile. Raises UsageError where the folder is another user's."""
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        found = os.fstat(opened)
        if found.st_uid != os.geteuid() or found.st_mode & stat.S_IWOTH:
            raise UsageError(f"{folder} is not yours alone: give another --dir")
        fcntl.flock(opened, fcntl.LOCK_EX)
        yield
    finally:
        os.close(opened)
