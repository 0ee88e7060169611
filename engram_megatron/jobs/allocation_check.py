"""The preflight of a job's nodes, started by its batch step: which of them the run should do without."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass

from engram_megatron.jobs.allocation import Allocation
from engram_megatron.jobs.frozen import Frozen
from engram_megatron.jobs.training_step import contained

_NUMBER = 0  # of the meeting: tries of training count from 1
EXIT_USAGE, EXIT_BAD_NODES = 2, 3


@dataclass(frozen=True)
class Checked:
    """`bad_nodes`: name to reason. `is_usable`: whether the run itself can start anywhere."""

    code: int
    bad_nodes: dict[str, str]

    @property
    def is_usable(self) -> bool:
        return self.code != EXIT_USAGE


def check_allocation(frozen: Frozen, allocation: Allocation, python: str) -> Checked:
    """Run slurm/preflight.py on all nodes; it prints to the job's log."""
    options = frozen.options
    tasks = [*allocation.tasks(), "--wait=30"]
    program = [python, str(frozen.code / "slurm/preflight.py"), frozen.preset, *frozen.overrides]
    program += [f"--nproc-per-node={options.ranks_on_node}", f"--master-addr={allocation.nodes[0]}"]
    program += [f"--master-port={allocation.port(_NUMBER)}", f"--node-names={','.join(allocation.nodes)}"]
    code = subprocess.run([*tasks, *contained(frozen, program)], check=False).returncode
    bad_nodes: dict[str, str] = {}
    if code == EXIT_BAD_NODES:
        bad_nodes = json.loads((frozen.run_dir / "job/preflight.json").read_text())["bad_nodes"]
    return Checked(code, bad_nodes)
