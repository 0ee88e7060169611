"""The transport of this rank's group, of the kind that a run asks for."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist

from engram_megatron import platform
from engram_megatron.errors import UsageError
from engram_megatron.gather.transport.checked import CheckedTransport
from engram_megatron.gather.transport.device import DeviceTransport
from engram_megatron.gather.transport.gloo import GlooTransport
from engram_megatron.gather.transport.mpi import MpiTransport, world_communicator
from engram_megatron.gather.transport.protocol import LoopbackTransport, Member, Transport, UncheckedTransport

TransportKind = Literal["gloo", "mpi", "nccl"]


def group_transport(kind: TransportKind, groups: Sequence[Sequence[int]], timeout_s: float) -> Transport:
    """The checked transport between the ranks of the one group of `groups` that this rank is in.

    Collective over the default process group: all ranks give the same disjoint groups, of rising ranks, which cover
    the job. Rank i of the transport is the group's i-th rank. A group of one gets the loopback. An exchange that takes
    longer than `timeout_s` raises (gloo) or ends the process (MPI, NCCL).

    Raises:
        UsageError: this kind cannot work here, on every rank alike.
    """
    world_rank, world_size = dist.get_rank(), dist.get_world_size()
    assert sorted(rank for group in groups for rank in group) == list(range(world_size)), (groups, world_size)
    assert all(list(group) == sorted(group) for group in groups), groups  # torch sorts them
    mine = next(index for index, group in enumerate(groups) if world_rank in group)
    if max(len(group) for group in groups) == 1:
        return LoopbackTransport()
    world = _agree_on_kind(kind, world_rank, world_size)
    hosts: list[Any] = [None] * world_size
    dist.all_gather_object(hosts, socket.gethostname())
    if kind == "mpi":
        inner = _mpi(world, groups, mine, timeout_s)
    else:
        inner = _torch(kind, groups, mine, timeout_s)
    if inner.size == 1:
        return LoopbackTransport()
    return CheckedTransport(inner, [Member(rank, hosts[rank]) for rank in groups[mine]])


def all_ranks_transport(timeout_s: float, kind: TransportKind = "gloo") -> Transport:
    """The checked transport between all ranks of the default process group, which nothing else uses; collective.

    Without a process group, or alone in it, the loopback. Errors are those of `group_transport`.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return LoopbackTransport()
    return group_transport(kind, [range(dist.get_world_size())], timeout_s)


def _agree_on_kind(kind: TransportKind, world_rank: int, world_size: int) -> Any:
    """MPI's world for "mpi". Raises the first rank's reason on all ranks when `kind` cannot work on one of them."""
    world, problem = None, None
    if kind == "mpi":
        try:
            world = world_communicator(world_rank, world_size)
        except UsageError as error:
            problem = str(error)
    elif kind == "nccl" and not torch.cuda.is_available():
        problem = "the NCCL transport needs a GPU on every rank, and torch sees none; choose the gloo or MPI transport"
    problems: list[Any] = [None] * world_size
    dist.all_gather_object(problems, problem)
    for rank, told in enumerate(problems):
        if told is not None:
            raise UsageError(f"rank {rank}: {told}")
    return world


def _mpi(world: Any, groups: Sequence[Sequence[int]], mine: int, timeout_s: float) -> UncheckedTransport:
    return MpiTransport(world.Split(color=mine, key=list(groups[mine]).index(world.Get_rank())), timeout_s)


def _torch(kind: TransportKind, groups: Sequence[Sequence[int]], mine: int, timeout_s: float) -> UncheckedTransport:
    # torch wants every rank to make every group, in the same order.
    backend = "nccl" if kind == "nccl" else "gloo"
    made = [dist.new_group(list(g), backend=backend, timeout=timedelta(seconds=timeout_s)) for g in groups]
    return DeviceTransport(made[mine], platform.device()) if kind == "nccl" else GlooTransport(made[mine])
