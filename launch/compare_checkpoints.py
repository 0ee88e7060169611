"""Compare two checkpoints tensor by tensor: python launch/compare_checkpoints.py A B [--tolerance X]

Formats, layouts, blocks of rows and deltas do not matter, the numbers do. Exit code 0: equal to the bit (or, with
--tolerance, within X times the largest value of each tensor); 1: different.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

from engram_checkpoints.compare import differences, state_differences
from engram_checkpoints.open_checkpoint import open_checkpoint
from engram_megatron.errors import UsageError


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("a", type=Path, metavar="A")
    parser.add_argument("b", type=Path, metavar="B")
    parser.add_argument("--tolerance", type=float, default=0.0, metavar="X", help="relative; 0: equal to the bit")
    return parser.parse_args()


def run() -> int:
    arguments = parse()
    a, b = open_checkpoint(arguments.a), open_checkpoint(arguments.b)
    too_far = 0
    with tqdm(total=a.num_bytes, unit="B", unit_scale=True, unit_divisor=1024, disable=None) as progress:
        for found in differences(a, b, progress.update):
            is_far = found.relative is None or found.relative > arguments.tolerance or not arguments.tolerance
            too_far += is_far
            progress.write(f"{'different' if is_far else 'near'}  {found.name}: {found.text}", file=sys.stdout)
    for found in state_differences(a, b, config=True):
        print(f"free       {found.name}: {found.text}")
    print(f"{a.path} ({a.format}) and {b.path} ({b.format}) " + (f"differ in {too_far}" if too_far else "are equal"))
    return 1 if too_far else 0


def main() -> int:
    try:
        return run()
    except UsageError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
