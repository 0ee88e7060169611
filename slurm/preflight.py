"""Check the nodes of an allocation before training, one task per node:

    srun --ntasks-per-node=1 python slurm/preflight.py PRESET --master-addr HEAD run_dir=DIR data.corpus=DIR [key=value]

or under torchrun (--nproc-per-node=1). Prints a line per problem and a summary on the first node, which also writes
RUN_DIR/job/preflight.json. Exit code: 0 good, 3 bad nodes found, 2 a mistake of the user, 1 anything else.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys

from engram_data.errors import CorpusError
from engram_megatron.errors import UsageError
from engram_megatron.overrides import apply_overrides
from engram_megatron.presets import preset


def parse() -> argparse.Namespace:
    variables, form = os.environ, argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form, allow_abbrev=False)
    parser.add_argument("preset", metavar="PRESET")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for launch/train.py")
    parser.add_argument("--nproc-per-node", type=int, default=1, metavar="N", help="ranks of training per node")
    rank, size = variables.get("RANK", variables.get("SLURM_PROCID", "0")), variables.get("SLURM_NTASKS", "1")
    parser.add_argument("--rank", type=int, default=rank, help="number of this node, from 0")
    parser.add_argument("--world-size", type=int, default=variables.get("WORLD_SIZE", size), help="number of nodes")
    parser.add_argument("--master-addr", default=variables.get("MASTER_ADDR", "localhost"), help="of node 0")
    parser.add_argument("--master-port", type=int, default=variables.get("MASTER_PORT", "29400"))
    name = variables.get("SLURMD_NODENAME", socket.gethostname())
    parser.add_argument("--node-name", default=name, help="of this node; default: Slurm's, else the host's")
    parser.add_argument("--node-names", default="", metavar="A,B,...", help="of all, to name one that does not come")
    parser.add_argument("--wait", type=float, default=120.0, metavar="S", help="seconds for all nodes to come")
    parser.add_argument("--round", type=float, default=20.0, metavar="S", help="seconds for a round of links")
    return parser.parse_intermixed_args()


def check(arguments: argparse.Namespace) -> int:
    config = apply_overrides(preset(arguments.preset), arguments.overrides)
    if not config.run_dir or not config.data.corpus:
        raise UsageError("add run_dir=PATH and data.corpus=PATH, as the run will have them")
    from engram_megatron import platform
    from engram_megatron.jobs.node_meeting import Meeting, MeetingError
    from engram_megatron.jobs.node_needs import node_needs
    from engram_megatron.jobs.node_preflight import Limits, run_preflight

    platform.install()
    needs = node_needs(config, arguments.world_size, arguments.nproc_per_node)
    where = (arguments.master_addr, arguments.master_port, arguments.rank, arguments.world_size, arguments.wait)
    serves = arguments.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    limits = Limits(nodes_s=arguments.wait, round_s=arguments.round)
    expected = dict(enumerate(arguments.node_names.split(","))) if arguments.node_names else {}
    try:
        meeting = Meeting.join(*where, serves=serves)
        code, report = run_preflight(config, needs, meeting, arguments.node_name, limits=limits, expected=expected)
    except MeetingError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if report is not None:
        print(*report.lines(), sep="\n")
    return code


def main() -> int:
    arguments = parse()
    try:
        return check(arguments)
    except (UsageError, CorpusError) as error:
        if arguments.rank == 0:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    exit_code = main()
    sys.stdout.flush()
    os._exit(exit_code)  # a thread may be left in a transport that hangs
