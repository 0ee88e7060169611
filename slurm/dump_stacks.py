"""Stacks of all ranks of a run on this host, a file each: dump_stacks.py RUN_DIR FOLDER. Needs no answer of theirs."""

from __future__ import annotations

import sys
from pathlib import Path

from engram_megatron.jobs.stacks import dump_stacks


def main() -> int:
    for line in dump_stacks(Path(sys.argv[1]).absolute(), Path(sys.argv[2])):
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
