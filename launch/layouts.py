"""Train a small model in every parallel layout and compare with one rank; save it in one and resume it in another.

    python launch/layouts.py [--full | --third N] [--resume] [--only TEXT]

Without --full a selection in which every two settings of two factors meet (layout, packed documents, recomputation,
multi-token prediction). --third takes a part of it that has every layout once; CI runs another one each day. --resume
leaves out the first table. --only takes the layouts, and pairs of them, whose name contains TEXT. Runs on the CPU with
gloo, up to 8 ranks on this machine. Exit code 1 if a line fails.

First table, all relative differences from one rank. In float64, to be at most 1e-9: loss, loss of two packed documents
against that of the two alone, gradient norm, the worst gradient and the worst updated tensor (tables included) of two
steps. In float32: how far backbone or table drifted from float64 in five steps, in parts of the way they went; to be
at most 3 times what a change of the weights' last bit does to one rank. In bfloat16: the loss of one step, for
information.

Second table: two steps in layout A, saved, resumed in B; two more in both. Whether B, having loaded, saves the same
tensors and rows bit for bit; whether A does, having loaded what B saved; and whether A then goes on as if never broken
off, bit for bit. How far B's losses and its end are from those of A unbroken, in float32 with the same kind of bound.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable

from engram_megatron.layouts import resume_table, table
from engram_megatron.layouts.matrix import LAYOUTS, all_cases, pairwise_cases, third_of
from engram_megatron.layouts.resume_pairs import PAIRS
from engram_megatron.layouts.table import Line


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    selection = parser.add_mutually_exclusive_group()
    selection.add_argument("--full", action="store_true", help="every layout with every variation")
    selection.add_argument("--third", type=int, choices=(1, 2, 3), help="every layout with one variation")
    parser.add_argument(
        "--resume", action="store_true", help="only pairs of layouts: saved in one, resumed in the other"
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="layouts whose name contains TEXT")
    arguments = parser.parse_args()
    all_cells = [] if arguments.resume else all_cases() if arguments.full else pairwise_cases()
    if arguments.third:
        all_cells = third_of(all_cells, arguments.third)
    cells = [cell for cell in all_cells if arguments.only in cell[0].name]
    pairs = [pair for pair in PAIRS if arguments.only in pair.name]
    if not cells and not pairs:
        names = ", ".join(layout.name for layout in LAYOUTS)
        print(f"layouts: no layout's name contains {arguments.only!r}; there are {names}", file=sys.stderr)
        return 2
    good = True
    if cells:
        good &= show(table.HEADER, table.lines(cells), f"{len(cells)} runs of layouts equal one rank")
    if pairs:
        good &= show(resume_table.HEADER, resume_table.lines(pairs), f"{len(pairs)} resumes in another layout are good")
    return 0 if good else 1


def show(header: str, lines: Iterable[Line], claim: str) -> bool:
    """Print a table as its lines come; says whether all are good."""
    started, num_lines, failures, float32_share = time.monotonic(), 0, [], 0.0
    print(header, flush=True)
    for line in lines:
        print(line.text, flush=True)
        num_lines += 1
        float32_share = max(float32_share, line.float32_share)
        if not line.passes:
            failures.append(line)
    for line in failures:
        if line.details:
            print(f"\n{line.text}\n{line.details}", file=sys.stderr)
    minutes = (time.monotonic() - started) / 60
    print(f"{num_lines - len(failures)} of {claim}; {minutes:.1f} minutes")
    print(f"float32: at most {float32_share:.0%} of the bound")
    return not failures


if __name__ == "__main__":
    sys.exit(main())
