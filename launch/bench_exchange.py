"""Time the checked exchange between ranks against the bare all-to-all of the same bytes.

    python launch/bench_exchange.py [--nproc-per-node N] [--repeats N]           gloo
    mpirun -n N python launch/bench_exchange.py [--repeats N]                    gloo and MPI

Also under torchrun or mpirun on several hosts. A ratio above 1 means that ours is faster; the target is the least ratio
wanted. iperf3, where it is installed, says what one TCP connection of this host to itself carries. The exit code is 0
whatever the ratios are.
"""

from __future__ import annotations

import argparse
import os
import sys

import torch.distributed as dist

from engram_megatron import platform
from engram_megatron.benchmarks.exchange import checksum, exchange, loopback_speed
from engram_megatron.benchmarks.measure import table
from engram_megatron.errors import UsageError
from engram_megatron.gather.transport import TransportKind
from engram_megatron.training.launch_ranks import launch_ranks
from engram_megatron.training.mpi_launch import join_mpi_launch
from engram_megatron.training.rank_main import threads_per_rank


def run_rank(kinds: tuple[TransportKind, ...], repeats: int) -> None:
    threads = threads_per_rank()
    platform.limit_threads(threads)
    dist.init_process_group("gloo")
    comparisons = [found for kind in kinds for found in exchange(kind, repeats)]
    dist.barrier()
    if dist.get_rank() == 0:
        print(f"{dist.get_world_size()} ranks, {threads} threads each")
        print(table(checksum(repeats) + comparisons), flush=True)
        print(loopback_speed(), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nproc-per-node", type=int, default=2, metavar="N", help="ranks to start on this host")
    parser.add_argument("--repeats", type=int, default=50, metavar="N", help="rounds whose median is taken")
    arguments = parser.parse_args()
    try:
        by_mpi = join_mpi_launch()
        if "RANK" not in os.environ:
            return launch_ranks([sys.executable, *sys.argv], arguments.nproc_per_node)
        run_rank(("gloo", "mpi") if by_mpi else ("gloo",), arguments.repeats)
    except UsageError as error:
        print(f"bench_exchange: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
