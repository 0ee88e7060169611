"""One rank, as a task of srun: start_rank.py --ranks N --address HOST --port P TRAIN.PY [arguments]

In place of torchrun: srun knows this rank's number and how many there are, N on each node, which meet at HOST:P. This
process becomes the rank.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys

from engram_megatron.jobs.environment import this_task
from engram_megatron.training.stop_signal import STOP_SIGNALS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, required=True, help="on each node")
    parser.add_argument("--address", required=True, help="of the first node")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="TRAIN.PY")
    arguments = parser.parse_args()
    task = this_task()
    os.environ |= {
        "RANK": str(task.number),
        "WORLD_SIZE": str(task.num_tasks),
        "LOCAL_RANK": str(task.number_on_node),
        "LOCAL_WORLD_SIZE": str(arguments.ranks),
        "MASTER_ADDR": arguments.address,
        "MASTER_PORT": str(arguments.port),
    }
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // arguments.ranks)))
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # until the rank listens, so that none is lost or kills it
    os.execv(sys.executable, [sys.executable, *arguments.command])


if __name__ == "__main__":
    main()
