"""Train a preset: python launch/train.py PRESET [--nproc-per-node N] run_dir=DIR data.corpus=DIR [key=value ...]

Checks everything first, then starts the ranks. Under torchrun, which sets RANK, and under mpirun it is the rank's
program.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace

from engram_data.errors import CorpusError
from engram_megatron.config import RunConfig
from engram_megatron.errors import UsageError
from engram_megatron.overrides import apply_overrides
from engram_megatron.presets import preset, preset_names
from engram_megatron.training.mpi_launch import join_mpi_launch


def parse() -> tuple[argparse.Namespace, RunConfig]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", metavar="PRESET", help=", ".join(preset_names()))
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="strict overrides of the preset")
    parser.add_argument("--nproc-per-node", type=int, default=1, metavar="N", help="ranks to start on this node")
    parser.add_argument("--world-size", type=int, metavar="N", help="ranks to plan for with --dry-run")
    parser.add_argument(
        "--resume", action="store_true", help="continue the run in run_dir (from the start if it is new)"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the resolved config and the plan, start nothing")
    parser.add_argument("--profile", metavar="steps=A:B", help="profile steps A..B-1, a Chrome trace per rank")
    arguments = parser.parse_intermixed_args()
    config = apply_overrides(preset(arguments.preset), arguments.overrides)
    if arguments.profile:
        config = replace(config, training=replace(config.training, **profile_window(arguments.profile)))
    return arguments, config


def profile_window(text: str) -> dict[str, int]:
    start, _, stop = text.removeprefix("steps=").partition(":")
    if not (start.isdigit() and stop.isdigit() and int(start) < int(stop)):
        raise UsageError(f"--profile {text!r} is not of the form steps=A:B with A < B")
    return {"profile_start": int(start), "profile_stop": int(stop)}


def start() -> int:
    arguments, config = parse()
    num_ranks = arguments.nproc_per_node
    if arguments.dry_run:
        from engram_megatron.training.plan import describe

        print(describe(config, num_ranks if arguments.world_size is None else arguments.world_size))
        return 0
    join_mpi_launch()
    if "RANK" not in os.environ and int(os.environ.get("SLURM_NTASKS", "1")) > 1:
        raise UsageError(
            "under srun start one task per node, with torchrun: srun torchrun ... launch/train.py ...; or one task per "
            "rank, with an MPI plugin: srun --mpi=pmix python launch/train.py ..."
        )
    if "RANK" not in os.environ:
        from engram_megatron.training.preflight import check_start

        check_start(config, num_ranks, resume=arguments.resume)
    if "RANK" in os.environ or num_ranks == 1:
        from engram_megatron.training.rank_main import run_rank

        return run_rank(config, resume=arguments.resume)
    from engram_megatron.training.launch_ranks import launch_ranks

    return launch_ranks([sys.executable, *sys.argv], num_ranks)


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
