"""What Slurm has given to this job, as its batch step sees it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from engram_megatron.errors import UsageError
from engram_megatron.jobs import slurm

# Below the range of outgoing connections; two jobs on one head node at a time get different ones, as a rule.
_FIRST_PORT, _NUM_PORTS = 12000, 16000


@dataclass(frozen=True)
class Allocation:
    """`nodes` by name, the head node first. `idle`: those that the run's layout has no use for."""

    job_id: str
    restarts: int
    nodes: tuple[str, ...]
    idle: tuple[str, ...] = ()

    def first(self, count: int) -> Allocation:
        """The same with `count` nodes, the others idle."""
        return replace(self, nodes=self.nodes[:count], idle=self.nodes[count:] + self.idle)

    def told(self, asked: int) -> dict[str, Any]:
        """Fields of an event: nodes, and where they are fewer than the `asked` ones, that."""
        fewer = {"asked_for": asked} if len(self.nodes) < asked else {}
        return {"nodes": list(self.nodes), **fewer, **({"idle": list(self.idle)} if self.idle else {})}

    def tasks(self) -> list[str]:
        """The words of srun that make a task on each node."""
        return ["srun", f"--nodes={len(self.nodes)}", f"--nodelist={','.join(self.nodes)}", "--ntasks-per-node=1"]

    def port(self, number: int) -> int:
        """For the `number`-th meeting of ranks in this job."""
        return _FIRST_PORT + (int(self.job_id) * 31 + self.restarts * 7 + number) % _NUM_PORTS


def allocation_of(environment: Mapping[str, str]) -> Allocation:
    """Raises `UsageError` outside a job's batch step."""
    if "SLURM_JOB_ID" not in environment or "SLURM_JOB_NODELIST" not in environment:
        raise UsageError("run_job.py is started by Slurm: submit with slurm/submit.py")
    return Allocation(
        job_id=environment["SLURM_JOB_ID"],
        restarts=int(environment.get("SLURM_RESTART_COUNT", "0")),
        nodes=tuple(slurm.hosts_of(environment["SLURM_JOB_NODELIST"])),
    )
