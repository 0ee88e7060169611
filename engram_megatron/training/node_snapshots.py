"""Saves to the disks of the nodes, each with a copy on the next node: what `checkpoint.local_dir` asks for.

They cost the shared file system nothing, so they can be frequent. `node_resume` makes a checkpoint of one.
"""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from engram_checkpoints.checkpoint_files import FileSums, complete
from engram_checkpoints.node_snapshots import part_path, remove_saves, save_name
from engram_megatron.config import RunConfig
from engram_megatron.gather.topology import Topology, find_topology
from engram_megatron.training.buddy_copy import Neighbours, swap_files
from engram_megatron.training.parallel import Ranks
from engram_megatron.training.run_folder import RunFolder
from engram_megatron.training.save_target import free_space, merged
from engram_megatron.training.together import Together, last_line


@dataclass(eq=False)
class NodeSnapshots:
    """Those of one run, in `folder` on the disk of each node. `start`: this start's number, the same on all ranks.

    There are two at most, the newest that is whole (`keep`) and one that is being written or failed; both can be whole.
    """

    folder: Path
    topology: Topology
    start: int
    keep: str | None = None

    def target(self, step: int) -> NodeSnapshot:
        return NodeSnapshot(self, save_name(step, self.start))

    def remove_others(self) -> None:
        """Remove what is not `keep` from this node's disk, if this is its first rank."""
        if self.topology.rail == 0:
            remove_saves(self.folder, keep=self.keep)

    def remove(self) -> None:
        """Remove all of them from this node's disk, if this is its first rank."""
        self.keep = None
        self.remove_others()


def node_snapshots(config: RunConfig, run: RunFolder, ranks: Ranks, keep: str | None) -> NodeSnapshots:
    """Those of a run that its first rank has claimed, after a resume from `keep`; there are no others from now on: they
    would be of steps that this start does again. Collective.

    Raises `UsageError` where nodes have different numbers of ranks.
    """
    told: list[Any] = [run.run_id() if ranks.is_first else None, secrets.randbits(32)]
    dist.broadcast_object_list(told, src=0, group=ranks.host_group)
    run_id, start = told
    folder = local_folder(config.checkpoint.local_dir, run.path, run_id)
    topology = find_topology(ranks.host_group, config.tables.ranks_per_node)
    snapshots = NodeSnapshots(folder, topology, start, keep)
    snapshots.remove_others()
    return snapshots


def local_folder(local_dir: str, run_dir: Path, run_id: str) -> Path:
    """A run's folder on every node, with the name of its run folder, for people, and a number that is neither that of
    a copy of the run folder nor that of another run that has stood in its place."""
    place = run_dir.absolute()
    number = hashlib.sha256(f"{run_id} {place}".encode()).hexdigest()[:8]
    return Path(local_dir).absolute() / f"{place.name}-{number}"


@dataclass(frozen=True)
class NodeSnapshot:
    """A `SaveTarget`: the part of this rank's node."""

    snapshots: NodeSnapshots
    save: str
    may_fail: bool = True
    metric: str = "local_snapshot"

    @property
    def path(self) -> Path:
        topology = self.snapshots.topology
        return self._part(topology.node, is_copy=False)

    def __str__(self) -> str:
        return f"{self.snapshots.folder / self.save} on the disks of {self.snapshots.topology.num_nodes} nodes"

    def begin(self) -> None:
        self.snapshots.remove_others()
        if self.snapshots.topology.rail == 0:
            self.path.mkdir(parents=True)

    def complete(self, together: Together, group: dist.ProcessGroup, sums: FileSums) -> None:
        topology = self.snapshots.topology
        self._seal(together, sums)
        if topology.num_nodes > 1:
            ranks = topology.num_nodes * topology.ranks_per_node
            next_rank = (topology.rank + topology.ranks_per_node) % ranks
            rank_before = (topology.rank - topology.ranks_per_node) % ranks
            neighbours = Neighbours(group, send_to=next_rank, receive_from=rank_before)
            received = FileSums(self._part((topology.node - 1) % topology.num_nodes, is_copy=True))
            together(lambda: swap_files(neighbours, self.path, sums.sums(), received))
            self._seal(together, received)
        self.snapshots.keep = self.save

    def reason(self, error: BaseException) -> str:
        kept = self.snapshots.keep
        return (
            f"{self} could not be written (node {self.snapshots.topology.node}: {last_line(error)}; "
            f"{free_space(self.path)}); training goes on, {'no such snapshot' if kept is None else kept} is there"
        )

    def _seal(self, together: Together, sums: FileSums) -> None:
        """Make the folder of `sums` count, in which all ranks of this node have written. Collective."""
        of_ranks = together(sums.flush)
        first = self.snapshots.topology.node * self.snapshots.topology.ranks_per_node
        of_node = merged(of_ranks[first : first + self.snapshots.topology.ranks_per_node])
        together(lambda: complete(sums.folder, of_node) if self.snapshots.topology.rail == 0 else None)

    def _part(self, node: int, *, is_copy: bool) -> Path:
        snapshots = self.snapshots
        return part_path(snapshots.folder, self.save, node, snapshots.topology.num_nodes, is_copy=is_copy)
