"""Train a preset: python launch/train.py PRESET [--nproc-per-node N] run_dir=DIR data.corpus=DIR [key=value ...]

Checks everything first, then starts the ranks. Under torchrun, which sets RANK, and under mpirun it is the rank's
program.
"""

from __future__ import annotations

import os
import sys

from engram_data.errors import CorpusError
from engram_megatron.errors import UsageError
from engram_megatron.training.command_line import check_set_aside, of_ranks, parse
from engram_megatron.training.mpi_launch import join_mpi_launch


def start() -> int:
    arguments, config = parse(__doc__)
    num_ranks = arguments.nproc_per_node
    if arguments.dry_run:
        from engram_megatron.training.plan import describe

        print(describe(config, num_ranks if arguments.world_size is None else arguments.world_size))
        return 0
    join_mpi_launch()
    check_set_aside(arguments)
    if "RANK" not in os.environ and int(os.environ.get("SLURM_NTASKS", "1")) > 1:
        raise UsageError(
            "under srun start one task per node, with torchrun: srun torchrun ... launch/train.py ...; or one task per "
            "rank, with an MPI plugin: srun --mpi=pmix python launch/train.py ..."
        )
    if "RANK" not in os.environ:
        from engram_megatron.training.preflight import check_start

        check_start(config, num_ranks, resume=arguments.resume, set_aside=arguments.set_aside_damaged)
    if "RANK" in os.environ or num_ranks == 1:
        from engram_megatron.training.rank_main import run_rank

        return run_rank(config, resume=arguments.resume)
    from engram_megatron.training.launch_ranks import launch_ranks

    return launch_ranks([sys.executable, *of_ranks(sys.argv)], num_ranks)


def main() -> int:
    try:
        return start()
    except (UsageError, CorpusError) as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before the ranks have started
        return 130


if __name__ == "__main__":
    sys.exit(main())
