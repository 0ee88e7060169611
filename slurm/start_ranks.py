"""One node's ranks, as a task of srun: start_ranks.py --ranks N --address HOST --port P TRAIN.PY [arguments]

The node's number and how many there are come from srun. Stop signals go on to the ranks.
"""

from __future__ import annotations

import argparse
import os
import sys

# The last agent to end finds the first one's store closed, which torch reports with a stack of C++: that is no fault.
# Ranks do not inherit it.
os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"
from engram_megatron.jobs.environment import this_task
from engram_megatron.training.launch_ranks import Node, launch_ranks

del os.environ["TORCH_CPP_LOG_LEVEL"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, required=True, help="on each node")
    parser.add_argument("--address", required=True, help="of the first node")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="TRAIN.PY")
    arguments = parser.parse_args()
    task = this_task()
    node = Node(number=task.number, num_nodes=task.num_tasks, address=arguments.address, port=arguments.port)
    return launch_ranks([sys.executable, *arguments.command], arguments.ranks, node)


if __name__ == "__main__":
    sys.exit(main())
