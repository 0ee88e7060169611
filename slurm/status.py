"""What a run does and what happened to it: python slurm/status.py RUN_DIR [--watch [SECONDS]] [--json]

Reads the run folder, and Slurm's queue where there is one; changes nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

from engram_megatron.errors import UsageError
from engram_megatron.jobs.status import read_status
from engram_megatron.jobs.status_text import status_lines

CLEAR_SCREEN = "\x1b[2J\x1b[H"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    parser.add_argument("--watch", type=float, nargs="?", const=10.0, metavar="SECONDS", help="again and again")
    parser.add_argument("--json", action="store_true", help="for machines; one object in a line")
    arguments = parser.parse_args()
    if arguments.watch is not None and not arguments.watch > 0:
        parser.error(f"--watch {arguments.watch:g} must be a positive number of seconds")
    return arguments


def show(arguments: argparse.Namespace) -> None:
    status = read_status(arguments.run_dir)
    text = json.dumps(asdict(status)) if arguments.json else "\n".join(status_lines(status))
    clear = CLEAR_SCREEN if arguments.watch is not None and sys.stdout.isatty() else ""
    print(f"{clear}{text}", flush=True)


def main() -> int:
    arguments = parse()
    try:
        show(arguments)
        while arguments.watch is not None:
            time.sleep(arguments.watch)
            show(arguments)
    except UsageError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, BrokenPipeError):
        sys.stderr.close()  # so that nothing is said of a pipe that is closed
    return 0


if __name__ == "__main__":
    sys.exit(main())
