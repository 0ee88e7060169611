"""Whether checkpoints are whole: python launch/verify_checkpoint.py PATH... [--set-aside]

PATH is a checkpoint, or a run folder, all of whose checkpoints are verified. Every file is compared with the manifest,
a delta's base too. Exit code 0: all that count are whole; 1: one is damaged.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

from engram_checkpoints.report_text import size
from engram_checkpoints.run_checkpoints import is_run_folder
from engram_checkpoints.verify import checkpoints_at, manifest_bytes, set_aside, verify
from engram_megatron.errors import UsageError


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", type=Path, nargs="+", metavar="PATH")
    parser.add_argument(
        "--set-aside", action="store_true", help="rename COMPLETE of a damaged one, so that --resume does not see it"
    )
    return parser.parse_args()


def run() -> int:
    arguments = parse()
    damaged = 0
    for path in arguments.paths:
        folders = checkpoints_at(path)
        total = sum(map(manifest_bytes, folders))
        with tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1024, disable=None) as progress:
            for found in verify(folders, progress.update):
                if not found.problems:
                    progress.write(f"whole       {found.path}  {size(found.num_bytes)}", file=sys.stdout)
                    continue
                is_damaged = found.is_complete or not is_run_folder(path)  # an unfinished save of a run does not count
                damaged += is_damaged
                kind = "damaged" if is_damaged else "incomplete"
                progress.write("\n".join(f"{kind:11} {problem}" for problem in found.problems), file=sys.stdout)
                if arguments.set_aside and found.is_complete:
                    set_aside(found.path, found.problems)
                    progress.write(f"set aside   {found.path}: --resume takes the one before", file=sys.stdout)
    return 1 if damaged else 0


def main() -> int:
    try:
        return run()
    except UsageError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
