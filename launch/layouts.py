"""Train a small model in every parallel layout and compare it with one rank: a line per layout and variation.

    python launch/layouts.py [--full] [--only TEXT]

Without --full a selection in which every two settings of two factors meet (layout, packed documents, recomputation,
multi-token prediction). --only takes the layouts whose name contains TEXT. Runs on the CPU with gloo, up to 8 ranks on
this machine. Exit code 1 if a line fails.

Columns, all relative differences from one rank. In float64, to be at most 1e-9: loss, loss of two packed documents
against that of the two alone, gradient norm, the worst gradient and the worst updated tensor (tables included) of two
steps. In float32: how far backbone or table drifted from float64 in five steps, in parts of the way they went; to be
at most 3 times what a change of the weights' last bit does to one rank. In bfloat16: the loss of one step, for
information.
"""

from __future__ import annotations

import argparse
import sys
import time

from engram_megatron.layouts.matrix import LAYOUTS, all_cases, pairwise_cases
from engram_megatron.layouts.table import HEADER, lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="every layout with every variation")
    parser.add_argument("--only", default="", metavar="TEXT", help="layouts whose name contains TEXT")
    arguments = parser.parse_args()
    cells = [cell for cell in (all_cases() if arguments.full else pairwise_cases()) if arguments.only in cell[0].name]
    if not cells:
        names = ", ".join(layout.name for layout in LAYOUTS)
        print(f"layouts: no layout's name contains {arguments.only!r}; there are {names}", file=sys.stderr)
        return 2
    started, failures, float32_share = time.monotonic(), [], 0.0
    print(HEADER, flush=True)
    for line in lines(cells):
        print(line.text, flush=True)
        float32_share = max(float32_share, line.float32_share)
        if not line.passes:
            failures.append(line)
    minutes = (time.monotonic() - started) / 60
    layouts = len({layout for layout, _ in cells})
    for line in failures:
        if line.details:
            print(f"\n{line.text}\n{line.details}", file=sys.stderr)
    print(
        f"{len(cells) - len(failures)} of {len(cells)} runs of {layouts} layouts equal one rank; {minutes:.1f} minutes"
    )
    print(f"float32: at most {float32_share:.0%} of the bound")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
