"""The programs that a cluster is made of, and which Debian packages hold them."""

from __future__ import annotations

import os
import shutil

from engram_megatron.errors import UsageError

PACKAGES = {
    "slurmctld": "slurm-wlm",
    "slurmd": "slurm-wlm",
    "sbatch": "slurm-wlm",
    "munged": "munge",
    "ip": "iproute2",
    "unshare": "util-linux",
    "nsenter": "util-linux",
}


def search_path() -> str:
    """PATH with the folders of daemons, which users' often lacks."""
    return os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])


def missing_packages() -> list[str]:
    """Debian's names of the packages that are not installed."""
    path = search_path()
    return sorted({package for program, package in PACKAGES.items() if shutil.which(program, path=path) is None})


def require_programs() -> None:
    """Raises UsageError naming the packages to install."""
    missing = missing_packages()
    if missing:
        raise UsageError(f"a local cluster needs programs that are not here: apt-get install {' '.join(missing)}")
