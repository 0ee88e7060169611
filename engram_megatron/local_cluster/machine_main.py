"""The first process of a machine of the cluster: makes it one, starts its daemon, and waits for the dead.

Run as a file with the standard library alone: python -I -S machine_main.py JSON. The fields are those of
`machine.MachineStart`. In namespaces it is process 1 of its machine: when it is killed, so is all that runs there. As a
plain process it inherits the orphans of its tree, so that all of a node stays below it.
"""

from __future__ import annotations

import ctypes
import json
import os
import socket
import subprocess
import sys
import time
from typing import Any

PR_SET_CHILD_SUBREAPER = 36


def isolate(fields: dict[str, Any]) -> None:
    """Own host name, names of hosts, /dev/shm and scratch, and the devices of the own network in /sys."""
    socket.sethostname(fields["hostname"])
    size = "" if fields["shm_mib"] is None else f",size={fields['shm_mib']}m"
    for arguments in (
        ["-t", "sysfs", "sysfs", "/sys"],
        ["-t", "tmpfs", "-o", f"mode=1777{size}", "tmpfs", "/dev/shm"],
        ["--bind", fields["hosts_file"], "/etc/hosts"],
        ["--bind", fields["disk"], fields["scratch"]],
    ):
        subprocess.run(["mount", *arguments], check=True)


def main() -> None:
    fields = json.loads(sys.argv[1])
    os.sched_setaffinity(0, fields["cores"])
    if fields["isolated"]:
        isolate(fields)
    else:
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    if not sys.stdin.readline():  # the network is made from outside; an end of the file says that its maker has died
        sys.exit("not connected")
    subprocess.Popen(fields["daemon"], stdin=subprocess.DEVNULL)
    while True:  # the machine stays on when its daemon ends
        try:
            os.wait()
        except ChildProcessError:  # nothing runs here now
            time.sleep(0.2)


if __name__ == "__main__":
    main()
