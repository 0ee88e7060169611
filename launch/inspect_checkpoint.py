"""What is in a checkpoint: python launch/inspect_checkpoint.py PATH [--health] [--tensors] [--json]

PATH is a checkpoint of any format that launch/convert.py reads, or a run folder, whose checkpoints are listed.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from tqdm import tqdm

from engram_checkpoints.checkpoint_report import checkpoint_report, run_report
from engram_checkpoints.report_text import checkpoint_lines, run_lines
from engram_checkpoints.run_checkpoints import is_run_folder
from engram_megatron.errors import UsageError


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, metavar="PATH")
    parser.add_argument("--health", action="store_true", help="read every number: NaN, norms, rows and experts at rest")
    parser.add_argument("--tensors", action="store_true", help="a line for every tensor, not for every kind of tensor")
    parser.add_argument("--json", action="store_true", help="for machines; one object, every tensor")
    return parser.parse_args()


def run() -> None:
    arguments = parse()
    if is_run_folder(arguments.path):
        report = run_report(arguments.path)
        lines = run_lines(report)
    else:
        with tqdm(unit="B", unit_scale=True, unit_divisor=1024, disable=None if arguments.health else True) as progress:
            report = checkpoint_report(arguments.path, health=arguments.health, on_bytes=progress.update)
        lines = checkpoint_lines(report, every_tensor=arguments.tensors)
    print(json.dumps(report, indent=2) if arguments.json else "\n".join(lines))


def main() -> int:
    try:
        run()
    except UsageError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
