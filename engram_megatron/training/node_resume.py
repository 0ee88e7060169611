"""At a resume: the newest snapshot on the nodes' disks becomes an ordinary checkpoint of the run folder.

Every node says which parts stand whole on its disk. Those of one save, each from its own node or the one with its copy,
are copied together, by all ranks at a time, and compared with their sums on the way.
"""

from __future__ import annotations

import shutil
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

from engram_checkpoints.checkpoint_files import FileSums, complete, read_manifest
from engram_checkpoints.node_snapshots import Part, complete_parts, copy_files, step_of
from engram_checkpoints.train_state import TRAIN_STATE, TrainState
from engram_data.skipped_samples import Windows
from engram_megatron.config import RunConfig
from engram_megatron.errors import UsageError
from engram_megatron.gather.topology import Topology, find_topology
from engram_megatron.training.node_snapshots import local_folder
from engram_megatron.training.parallel import Ranks
from engram_megatron.training.rollback import has_read_any
from engram_megatron.training.run_folder import RunFolder
from engram_megatron.training.save_target import free_space, make_empty, merged
from engram_megatron.training.together import Together, last_line


def publish_newest(config: RunConfig, run: RunFolder, ranks: Ranks, skipped: Windows) -> str | None:
    """Make the newest save on the nodes' disks the newest checkpoint of `run`, whose lock is held from then on. All
    ranks call it; the first one prints what happens.

    Returns that save; None where none that is newer than the run's newest checkpoint is whole, or none is asked for.
    One that has read samples of `skipped`, which a rollback leaves out, does not count.
    Raises `UsageError` on all ranks where the run folder cannot be written.
    """
    if not config.checkpoint.local_dir:
        return None
    told: list[Any] = [run.run_id() if ranks.is_first else None]
    if ranks.is_first and told[0] is not None:
        run.lock()
    dist.broadcast_object_list(told, src=0, group=ranks.host_group)
    (run_id,) = told
    if run_id is None:
        return None  # it has never trained
    folder = local_folder(config.checkpoint.local_dir, run.path, run_id)
    topology = find_topology(ranks.host_group, config.tables.ranks_per_node)
    return _Publication(folder, run, topology, ranks.host_group, skipped).publish_newest()


class Held(NamedTuple):
    """A part, and the node of this start on whose disk it stands."""

    part: Part
    node: int
    host: str
    is_rolled_back: bool  # as far as it tells: one part of a save has the state of training


@dataclass(frozen=True, eq=False)
class _Publication:
    """Makes a checkpoint of `run` of the newest usable save in `folder`, a path on every node, with all ranks of the
    job, `group`."""

    folder: Path
    run: RunFolder
    topology: Topology
    group: dist.ProcessGroup
    skipped: Windows

    def publish_newest(self) -> str | None:
        """As the function."""
        newest = self._newest_step()
        held = self._held()
        rolled_back = {one.part.save for one in held if one.is_rolled_back}
        saves = {one.part.save for one in held if step_of(one.part.save) > newest} - rolled_back
        for save in sorted(saves, reverse=True):
            if self._publish(save, [one for one in held if one.part.save == save]):
                return save
        self._say("no whole snapshot on the nodes' disks is newer than the newest checkpoint")
        return None

    def _newest_step(self) -> int:
        """Of the run's complete checkpoints; -1 without one."""
        found: list[Any] = [-1]
        if self.topology.rank == 0:
            found = [
                max((int(path.name.removeprefix("step_")) for path in self.run.complete_checkpoints()), default=-1)
            ]
        dist.broadcast_object_list(found, src=0, group=self.group)
        return int(found[0])

    def _held(self) -> list[Held]:
        """By all nodes."""
        mine = []
        if self.topology.rail == 0:
            parts = complete_parts(self.folder)
            mine = [Held(part, self.topology.node, socket.gethostname(), self._is_rolled_back(part)) for part in parts]
        of_ranks: list[Any] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(of_ranks, mine, group=self.group)
        return [one for of_rank in of_ranks for one in of_rank]

    def _is_rolled_back(self, part: Part) -> bool:
        if not self.skipped or not (part.path / TRAIN_STATE).exists():
            return False
        try:
            return has_read_any(TrainState.read(part.path), self.skipped)
        except UsageError:
            return False  # its copy tells, or who copies it

    def _publish(self, save: str, held: Sequence[Held]) -> bool:
        """Whether the parts that are `held` have become a checkpoint. A damaged one is replaced by its copy."""
        path, left = self.run.checkpoint(step_of(save)), list(held)
        while (chosen := self._choose(save, left)) is not None:
            damages = self._copy_together(path, chosen)
            if not damages:
                return True
            for one, problem in damages.items():
                self._say(f"snapshot {save}, on {one.host}: {problem}")
            left = [one for one in left if one not in damages]
        return False

    def _choose(self, save: str, held: Sequence[Held]) -> list[Held] | None:
        """Who gives the part of each node: itself, if it can; None where nobody can."""
        num_nodes = held[0].part.num_nodes if held else 1
        copies_first = sorted(held, key=lambda one: not one.part.is_copy)
        chosen = {one.part.node: one for one in copies_first}
        missing = [str(node) for node in range(num_nodes) if node not in chosen]
        if missing:
            self._say(f"snapshot {save} cannot be used: no whole part of node {', '.join(missing)} is on any node")
            return None
        for one in chosen.values():
            if one.part.is_copy:
                self._say(f"snapshot {save}: the copy on {one.host} stands for the part of node {one.part.node}")
        return list(chosen.values())

    def _copy_together(self, path: Path, chosen: Sequence[Held]) -> dict[Held, str]:
        """Make checkpoint `path` of the parts; of those that are damaged what is wrong, and no checkpoint."""
        started = time.perf_counter()
        together = Together(self.group, (OSError,), UsageError, partial(_reason, path))
        together(lambda: make_empty(path) if self.topology.rank == 0 else None)
        sums = FileSums(path)
        damages = {one: problem for found in together(lambda: self._copy(chosen, sums)) for one, problem in found}
        if damages:
            together(lambda: shutil.rmtree(path) if self.topology.rank == 0 else None)
            return damages
        files = merged(together(sums.flush))
        together(lambda: complete(path, files) if self.topology.rank == 0 else None)
        size_gib = sum(file_sum.bytes for file_sum in files.values()) / 1024**3
        self._say(
            f"made {path} of what the nodes' disks hold: {size_gib:.2f} GiB in {time.perf_counter() - started:.1f} s"
        )
        return {}

    def _copy(self, chosen: Sequence[Held], sums: FileSums) -> list[tuple[Held, str]]:
        """This rank's share of what its node holds; of a part that is damaged what is wrong."""
        found = []
        for one in chosen:
            if one.node != self.topology.node:
                continue
            try:
                files = list(read_manifest(one.part.path).items())
                share = files[self.topology.rail :: self.topology.ranks_per_node]
                problem = next(copy_files(one.part, share, sums), None)
            except UsageError as error:
                problem = str(error)
            if problem is not None:
                found.append((one, problem))
        return found

    def _say(self, line: str) -> None:
        if self.topology.rank == 0:
            print(line, flush=True)


def _reason(path: Path, error: BaseException) -> str:
    return (
        f"the newest snapshot on the nodes' disks cannot be made checkpoint {path} ({last_line(error)}); "
        f"{free_space(path)}; make room, or resume without checkpoint.local_dir from the newest checkpoint"
    )
