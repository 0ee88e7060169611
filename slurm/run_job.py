"""A job's batch step, which Slurm starts: run_job.py RUN_DIR/job/NNN. Trains until the run has ended. docs/slurm.md"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from engram_megatron.errors import UsageError
from engram_megatron.jobs.allocation import allocation_of
from engram_megatron.jobs.frozen import read_frozen
from engram_megatron.jobs.node_counts import node_counts
from engram_megatron.jobs.supervisor import Supervisor
from engram_megatron.overrides import apply_overrides
from engram_megatron.presets import preset


def main() -> int:
    try:
        frozen, given = read_frozen(Path(sys.argv[1])), allocation_of(os.environ)
        config = apply_overrides(preset(frozen.preset), list(frozen.overrides))
        used = given.first(node_counts(config, frozen.options).of_given(len(given.nodes)))
        supervisor = Supervisor(frozen, used, sys.executable)
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, supervisor.receive)
        return supervisor.run()
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a run folder that cannot be written: what happens to the run could not be told
        print(f"error: the job ends: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
