"""Convert a checkpoint, without GPUs: python launch/convert.py SOURCE TARGET [--to FORMAT] [key=value ...]

SOURCE is a checkpoint folder, a run folder (its newest complete checkpoint), or a folder that Megatron wrote. Formats:
engram (ours), torch_dist (Megatron's, tables included), legacy (Megatron's file per rank, under the layout parallel.*).
After a kill the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from tqdm import tqdm

from engram_checkpoints.convert import convert, plan_conversion
from engram_megatron.errors import UsageError

FORMATS = ("engram", "torch_dist", "legacy")
GIB = 1024**3


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="SOURCE")
    parser.add_argument("target", type=Path, metavar="TARGET", help="a folder that is not there yet")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="tables.block_rows and parallel.* of TARGET")
    parser.add_argument("--to", choices=FORMATS, default="engram", help="format of TARGET (engram)")
    parser.add_argument("--memory-gib", type=float, default=4.0, metavar="N", help="for tensors at a time (4)")
    return parser.parse_intermixed_args()


def run() -> None:
    arguments = parse()
    memory = int(arguments.memory_gib * GIB)
    plan = plan_conversion(arguments.source, arguments.target, arguments.to, arguments.overrides, memory)
    started = time.perf_counter()
    with tqdm(unit="B", unit_scale=True, unit_divisor=1024, disable=None, desc=plan.to) as progress:
        convert(plan, progress.reset, progress.update)
    seconds = time.perf_counter() - started
    print(f"{plan.source.path} ({plan.source.format}) -> {plan.target} ({plan.to})")
    print(f"step {plan.state.step}, {plan.source.num_bytes / GIB:.2f} GiB of tensors, {seconds:.0f} s")


def main() -> int:
    try:
        run()
    except UsageError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.strerror or error} ({error.filename or 'a file of TARGET'})", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
