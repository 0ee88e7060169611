"""Time checkpoints against plain files on the same disk.

    python launch/bench_checkpoints.py [--folder PATH] [--rows N] [--repeats N] [--only NAME]

A ratio above 1 means that ours is faster; the target is the least ratio wanted. The exit code is 0 whatever they are.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numba
import torch

from engram_megatron.benchmarks import asynchronous_saves, conversions, table_files
from engram_megatron.benchmarks.measure import Comparison, table

SECTIONS: dict[str, Callable[[Path, int, int], Iterator[Comparison]]] = {
    "files": table_files.compare,
    "conversion": conversions.compare,
    "asynchronous": lambda folder, rows, _: asynchronous_saves.compare(folder, rows),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, metavar="PATH", help="on the disk to measure (default: the system's)")
    parser.add_argument("--rows", type=int, default=1_000_000, metavar="N", help="of 80 columns and two moments")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="rounds whose median is taken")
    parser.add_argument("--threads", type=int, default=2, metavar="N")
    parser.add_argument("--only", choices=list(SECTIONS), action="append", help="may be repeated")
    arguments = parser.parse_args()
    numba.set_num_threads(arguments.threads)
    torch.set_num_threads(arguments.threads)
    for name, section in SECTIONS.items():
        if arguments.only is None or name in arguments.only:
            with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
                print("\n" + table(list(section(Path(folder), arguments.rows, arguments.repeats))), flush=True)
    if arguments.only is None or "conversion" in arguments.only:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            for line in conversions.memory_lines(Path(folder), arguments.rows):
                print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
