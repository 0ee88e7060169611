"""Bytes that one rank of a layout needs, by kind, from the config alone.

Weights, gradients, optimizer state and tables are exact for the layout that `placement` states (allocator padding, step
counters and the experts' biases aside); activations are `activation_memory`'s estimate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from engram_megatron.config import RunConfig
from engram_megatron.model.activation_memory import activation_bytes, passes_in_flight
from engram_megatron.model.counts import TensorSpec
from engram_megatron.model.placement import (
    FLOAT32_BYTES,
    buffer_elements,
    gradient_bytes,
    rank_elements,
    rank_table_rows,
    specs_on,
    weight_bytes,
)

StateShares = Callable[[Sequence[TensorSpec]], Sequence[float]]


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """Bytes of one rank of one pipeline rank."""

    weights: int
    gradients: int
    master_weights: int  # float32 copies, for bfloat16 weights only
    optimizer_state: int
    activations: int  # estimate, all microbatches in flight
    passes_in_flight: int  # a number, not bytes: microbatches times chunks
    host_tables: int  # rows with their moments and last steps, in host memory
    disk_tables: int  # rows with their moments in files, where tables.placement = nvme

    @property
    def device(self) -> int:
        """All but the tables."""
        return self.weights + self.gradients + self.master_weights + self.optimizer_state + self.activations


def rank_memory(
    config: RunConfig,
    world_size: int,
    pipeline_rank: int,
    state_values: Callable[[TensorSpec], int],
    state_shares: StateShares | None = None,
) -> RankMemory:
    """Memory of a rank of pipeline rank `pipeline_rank`.

    `state_values` says how many values the optimizer keeps per element of a tensor (Muon 1, Adam 2), `state_shares` of
    which share of each tensor that the rank holds it keeps state and masters; None: of all. Raises `UsageError` where
    the layout does not divide over `world_size` ranks.
    """
    specs = specs_on(config, pipeline_rank)
    shares = [1.0] * len(specs) if state_shares is None else state_shares(specs)
    weights = gradients = 0
    masters = states = 0.0
    for spec, share in zip(specs, shares, strict=True):
        held, wide = rank_elements(spec, config.parallel), gradient_bytes(spec, config)
        in_buffer = buffer_elements(spec, config.parallel)
        weights += in_buffer * weight_bytes(spec, config)
        gradients += in_buffer * wide
        masters += 0 if weight_bytes(spec, config) >= FLOAT32_BYTES else held * share * FLOAT32_BYTES
        states += held * share * state_values(spec) * wide
    microbatches = config.training.num_microbatches(config.parallel.data(world_size))
    table_bytes = rank_table_bytes(config, world_size)
    return RankMemory(
        weights=weights,
        gradients=gradients,
        master_weights=round(masters),
        optimizer_state=round(states),
        activations=activation_bytes(config, pipeline_rank, microbatches),
        passes_in_flight=passes_in_flight(config, pipeline_rank, microbatches),
        host_tables=table_bytes.host,
        disk_tables=table_bytes.disk,
    )


class TableBytes(NamedTuple):
    """Bytes of tables and their moments: in memory, and in files."""

    host: int
    disk: int


def rank_table_bytes(config: RunConfig, world_size: int) -> TableBytes:
    """Of each rank, padding of the last blocks included; times `world_size`: of the job."""
    if config.engram is None:
        return TableBytes(0, 0)
    shape = rank_table_rows(config, world_size), config.engram.row_dim
    return TableBytes(config.tables.memory_bytes(*shape), config.tables.disk_bytes(*shape))
