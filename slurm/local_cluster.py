"""A Slurm cluster of several nodes on this machine (docs/local_cluster.md): python slurm/local_cluster.py VERB [...]

up, down, status, crash NODE (power off), boot NODE, run NODE -- COMMAND, and env:
    eval "$(python slurm/local_cluster.py env)"     # sbatch, srun, squeue of this shell talk to the cluster
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from pathlib import Path

from engram_megatron.errors import UsageError
from engram_megatron.local_cluster import cluster
from engram_megatron.local_cluster.machine import command_inside
from engram_megatron.local_cluster.settings import load_settings
from engram_megatron.local_cluster.slurm_client import client_environment
from engram_megatron.local_cluster.status_text import status_text


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--dir", type=Path, default=cluster.default_folder(), help="of the cluster (%(default)s)")
    starting = verbs.add_parser("up", parents=[common], help="start a cluster")
    starting.add_argument("--nodes", type=int, default=4, metavar="N", help="(%(default)s)")
    starting.add_argument("--cpus-per-node", type=int, default=2, metavar="N", help="real or not (%(default)s)")
    starting.add_argument(
        "--shm-mib", action="append", default=[], metavar="[NODE=]MIB", help="size of /dev/shm, of all nodes or of one"
    )
    starting.add_argument("--plain", action="store_true", help="plain processes even where namespaces are allowed")
    for verb, text in (("down", "end and remove it"), ("status", "its nodes"), ("env", "variables for your shell")):
        verbs.add_parser(verb, parents=[common], help=text)
    for verb, text in (("crash", "power a node off"), ("boot", "switch it on"), ("run", "run a command inside a node")):
        verbs.add_parser(verb, parents=[common], help=text).add_argument("node", metavar="NODE")
    verbs.choices["run"].add_argument("command", nargs="+", metavar="COMMAND", help="after --")
    return parser.parse_args()


def run(arguments: argparse.Namespace) -> None:
    folder = arguments.dir.absolute()
    if arguments.verb == "up":
        started = time.perf_counter()
        settings = cluster.up(
            folder, arguments.nodes, arguments.cpus_per_node, arguments.shm_mib, plain=arguments.plain
        )
        print(status_text(settings), f"up in {time.perf_counter() - started:.1f} s", sep="\n")
        return
    if arguments.verb == "down":
        cluster.down(folder)
        return
    settings = load_settings(folder)
    if arguments.verb == "status":
        print(status_text(settings))
    elif arguments.verb == "env":
        print(f"export SLURM_CONF={shlex.quote(str(settings.slurm_conf))}")
    elif arguments.verb == "crash":
        cluster.crash(settings, arguments.node)
    elif arguments.verb == "boot":
        cluster.boot(settings, arguments.node)
    else:
        command = command_inside(settings, settings.node(arguments.node).name, arguments.command)
        os.execvpe(command[0], command, client_environment(settings))


def main() -> int:
    try:
        run(parse())
    except UsageError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
