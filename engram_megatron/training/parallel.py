"""Process groups of a job: made once, closed once."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from numpy.typing import NDArray

from engram_megatron import platform
from engram_megatron.config import RunConfig
from engram_megatron.model.layout_rules import check_layout
from engram_megatron.model.sequence_partition import SequencePartition


@dataclass(frozen=True)
class Ranks:
    """Who this process is. `host_group` holds all ranks and is always gloo, for numbers on the host."""

    rank: int
    world_size: int
    data_rank: int
    data_ranks: int
    tensor_rank: int
    tensor_ranks: int
    context_rank: int
    context_ranks: int
    pipeline_rank: int
    host_group: dist.ProcessGroup

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def token_positions(self, length: int) -> NDArray[np.int64]:
        """Which of `length` positions this context rank computes, in its order: tokens, labels, logits."""
        return self._partition.context_positions(length, self.context_rank)

    def memory_positions(self, length: int) -> NDArray[np.int64]:
        """Which of them this rank's hidden states and memory are of, in its order."""
        return self._partition.positions(length, self.context_rank * self.tensor_ranks + self.tensor_rank)

    @property
    def _partition(self) -> SequencePartition:
        return SequencePartition(context=self.context_ranks, tensor=self.tensor_ranks)


def world_from_environment() -> tuple[int, int, int]:
    """(rank, world size, local rank) as torchrun sets them; a lone process is rank 0 of 1."""
    return tuple(int(os.environ.get(name, default)) for name, default in _VARIABLES)  # type: ignore[return-value]


_VARIABLES = (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))


def initialize(config: RunConfig) -> Ranks:
    """Make all process groups, bind the device and seed megatron-core's generators.

    Raises:
        UsageError: the layout does not fit the number of ranks.
    """
    rank, world_size, local_rank = world_from_environment()
    check_layout(config, world_size)
    platform.select_device(local_rank)
    timeout = timedelta(seconds=config.parallel.collective_timeout_s)
    if "MASTER_ADDR" in os.environ:
        dist.init_process_group(platform.backend(), timeout=timeout)
    else:
        store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True)  # type: ignore[attr-defined]
        dist.init_process_group(platform.backend(), store=store, rank=0, world_size=1, timeout=timeout)
    return initialize_groups(config, rank, world_size)


def initialize_groups(config: RunConfig, rank: int, world_size: int) -> Ranks:
    """The groups inside an initialised default process group (tests start here)."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.parallel.tensor,
        pipeline_model_parallel_size=config.parallel.pipeline,
        virtual_pipeline_model_parallel_size=(
            config.parallel.virtual_pipeline if config.parallel.virtual_pipeline > 1 else None
        ),
        context_parallel_size=config.parallel.context,
        expert_model_parallel_size=config.parallel.expert,
        expert_tensor_parallel_size=1,
        distributed_timeout_minutes=max(1, config.parallel.collective_timeout_s // 60),
    )
    model_parallel_cuda_manual_seed(config.training.seed)
    timeout = timedelta(seconds=config.parallel.collective_timeout_s)
    host_group = dist.new_group(backend="gloo", timeout=timeout)
    assert isinstance(host_group, dist.ProcessGroup)
    ranks = Ranks(
        rank=rank,
        world_size=world_size,
        data_rank=parallel_state.get_data_parallel_rank(),
        data_ranks=parallel_state.get_data_parallel_world_size(),
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        tensor_ranks=parallel_state.get_tensor_model_parallel_world_size(),
        context_rank=parallel_state.get_context_parallel_rank(),
        context_ranks=parallel_state.get_context_parallel_world_size(),
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        host_group=host_group,
    )
    sequence_rank = parallel_state.get_tensor_and_context_parallel_rank()
    assert sequence_rank == ranks.context_rank * ranks.tensor_ranks + ranks.tensor_rank, "as SequencePartition counts"
    return ranks


def close() -> None:
    """Destroy all groups. Without this about one process in twenty aborts at exit on gloo."""
    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def sum_over_ranks(values: list[float], ranks: Ranks) -> list[float]:
    """Sum of float64 values over all ranks, on the host."""
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total, group=ranks.host_group)
    return [float(value) for value in total]


def max_over_ranks(values: list[float], ranks: Ranks) -> list[float]:
    """Largest of all ranks' float64 values, one by one, on the host."""
    largest = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=ranks.host_group)
    return [float(value) for value in largest]


def once_per_replica(values: list[float], ranks: Ranks) -> list[float]:
    """What this rank adds to `sum_over_ranks` of values of its context rank's positions, which all tensor ranks hold
    alike: the first of them all, the others nothing. A value that is not finite stays so on every rank, wherever it
    arose."""
    share = 1.0 if ranks.tensor_rank == 0 else 0.0
    return [value * share for value in values]
