"""A job's batch step, which Slurm starts: run_job.py RUN_DIR/job/NNN. Trains until the run has ended. docs/slurm.md"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from engram_megatron.errors import UsageError
from engram_megatron.jobs.allocation import allocation_of
from engram_megatron.jobs.frozen import read_frozen
from engram_megatron.jobs.supervisor import Supervisor


def main() -> int:
    try:
        supervisor = Supervisor(read_frozen(Path(sys.argv[1])), allocation_of(os.environ), sys.executable)
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, supervisor.receive)
        return supervisor.run()
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
