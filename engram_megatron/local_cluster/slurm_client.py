"""What the cluster's slurmctld says, asked with Slurm's own commands."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Callable

from engram_megatron.local_cluster.programs import search_path
from engram_megatron.local_cluster.settings import ClusterSettings

USABLE = ("idle", "mixed", "allocated", "completing")
COMMAND_TIMEOUT_S = 30.0
POLL_S = 0.1


def client_environment(settings: ClusterSettings) -> dict[str, str]:
    """This program's environment, with the cluster as the one that Slurm's commands talk to."""
    return dict(os.environ) | {"PATH": search_path(), "SLURM_CONF": str(settings.slurm_conf)}


def controller_answers(settings: ClusterSettings) -> bool:
    return _ask(settings, "scontrol", "ping").returncode == 0


def node_states(settings: ClusterSettings) -> dict[str, str]:
    """Slurm's word for every node, such as idle, allocated, down*; empty when slurmctld does not answer."""
    shown = _ask(settings, "sinfo", "--noheader", "--Node", "--partition=main", "--format=%N %T")
    return dict(line.split(maxsplit=1) for line in shown.stdout.splitlines()) if shown.returncode == 0 else {}


def slurmd_started(settings: ClusterSettings, name: str) -> str:
    """When the slurmd started that slurmctld last heard from, as 2026-01-31T23:59:59; empty when it never has."""
    shown = _ask(settings, "scontrol", "--oneliner", "show", "node", name).stdout
    found = re.search(r"SlurmdStartTime=([0-9T:-]+)", shown)
    return found[1] if found else ""


def resume_node(settings: ClusterSettings, name: str) -> None:
    """What an operator does for a node that was down."""
    _ask(settings, "scontrol", "update", f"nodename={name}", "state=resume")


def wait_until(condition: Callable[[], bool], timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_S)
    return True


def _ask(settings: ClusterSettings, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        env=client_environment(settings),
        capture_output=True,
        text=True,
        timeout=COMMAND_TIMEOUT_S,
        check=False,
    )
