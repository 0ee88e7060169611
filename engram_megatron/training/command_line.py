"""What `launch/train.py` understands."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import replace

from engram_megatron.config import RunConfig
from engram_megatron.errors import UsageError
from engram_megatron.overrides import apply_overrides
from engram_megatron.presets import preset, preset_names

SET_ASIDE = "--set-aside-damaged"


def parse(description: str | None) -> tuple[argparse.Namespace, RunConfig]:
    """The options of this process's command line, and the config that they make of the preset.

    Raises `UsageError` for an override or a value that cannot be.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("preset", metavar="PRESET", help=", ".join(preset_names()))
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="strict overrides of the preset")
    parser.add_argument("--nproc-per-node", type=int, default=1, metavar="N", help="ranks to start on this node")
    parser.add_argument("--world-size", type=int, metavar="N", help="ranks to plan for with --dry-run")
    parser.add_argument(
        "--resume", action="store_true", help="continue the run in run_dir (from the start if it is new)"
    )
    parser.add_argument(
        SET_ASIDE,
        action="store_true",
        help="with --resume: verify the newest checkpoint first, and take the one before if it is damaged",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the resolved config and the plan, start nothing")
    parser.add_argument("--profile", metavar="steps=A:B", help="profile steps A..B-1, a Chrome trace per rank")
    arguments = parser.parse_intermixed_args()
    config = apply_overrides(preset(arguments.preset), arguments.overrides)
    if arguments.profile:
        first, stop = _profile_window(arguments.profile)
        config = replace(config, training=replace(config.training, profile_start=first, profile_stop=stop))
    return arguments, config


def check_set_aside(arguments: argparse.Namespace) -> None:
    """Raise `UsageError` where `--set-aside-damaged` would do nothing: who starts the ranks verifies, nobody else."""
    if arguments.set_aside_damaged and ("RANK" in os.environ or not arguments.resume):
        raise UsageError(
            f"{SET_ASIDE} goes with --resume, where launch/train.py starts the ranks itself; under torchrun or mpirun "
            "run launch/verify_checkpoint.py RUN_DIR --set-aside first"
        )


def of_ranks(command: Sequence[str]) -> list[str]:
    """The command line without what is done before the ranks start."""
    return [word for word in command if word != SET_ASIDE]


def _profile_window(text: str) -> tuple[int, int]:
    start, _, stop = text.removeprefix("steps=").partition(":")
    if not (start.isdigit() and stop.isdigit() and int(start) < int(stop)):
        raise UsageError(f"--profile {text!r} is not of the form steps=A:B with A < B")
    return int(start), int(stop)
