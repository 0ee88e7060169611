"""Pictures of TensorBoard for a report: python launch/screenshot_tensorboard.py LOGDIR OUT_FOLDER

LOGDIR is a run folder or a folder of runs. One PNG per dashboard; chromium (or google-chrome) must be installed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from engram_megatron.errors import UsageError
from engram_megatron.jobs.screenshots import screenshots


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logdir", type=Path, metavar="LOGDIR")
    parser.add_argument("folder", type=Path, metavar="OUT_FOLDER")
    arguments = parser.parse_args()
    try:
        for picture in screenshots(arguments.logdir, arguments.folder):
            print(picture)
    except UsageError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
