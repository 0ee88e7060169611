"""Collectives of parameters and their gradients, once in a step. Conventions: see `traffic`."""

from __future__ import annotations

from collections.abc import Callable

from engram_megatron.config import RunConfig
from engram_megatron.model.counts import TensorSpec
from engram_megatron.model.placement import (
    EMBEDDING,
    ROUTED,
    gradient_bytes,
    gradient_ranks,
    is_tensor_divided,
    rank_elements,
    specs_on,
)
from engram_megatron.model.transfers import Transfer, all_reduced, to_others


def gradient_transfers(config: RunConfig, world_size: int, pipeline_rank: int) -> list[Transfer]:
    """Sums of gradients over replicas, and over the two copies of the embedding that multi-token prediction makes."""
    dense = experts = embedding = 0
    for spec in specs_on(config, pipeline_rank):
        size = rank_elements(spec, config.parallel) * gradient_bytes(spec, config)
        sent = all_reduced(size, gradient_ranks(spec, config.parallel, world_size))
        if spec.part == ROUTED:
            experts += sent
        else:
            dense += sent
        if spec.part == EMBEDDING and config.model.mtp.num_layers and config.parallel.pipeline > 1:
            embedding += all_reduced(size, 2) if pipeline_rank in (0, config.parallel.pipeline - 1) else 0
    return [
        Transfer("gradients, dense", "data", "all-reduce", dense),
        Transfer("gradients, routed experts", "expert data", "all-reduce", experts),
        Transfer("gradients, both embeddings", "embedding", "all-reduce", embedding),
    ]


def tensor_rank_transfers(
    config: RunConfig, pipeline_rank: int, takes_muon: Callable[[TensorSpec], bool]
) -> list[Transfer]:
    """Between tensor ranks: gradients of what each holds whole but saw a slice of the sequence with, and Muon's
    all-gathers of the matrices of which each holds a part."""
    parallel = config.parallel
    specs = [spec for spec in specs_on(config, pipeline_rank) if spec.part != ROUTED]
    whole = [spec for spec in specs if not is_tensor_divided(spec)]
    # megatron-core flattens them into one tensor, which takes the widest dtype
    whole_bytes = sum(spec.count for spec in whole) * max((gradient_bytes(spec, config) for spec in whole), default=0)
    gathered = sum(
        spec.count * gradient_bytes(spec, config) for spec in specs if is_tensor_divided(spec) and takes_muon(spec)
    )
    return [
        Transfer("gradients, whole on tensor ranks", "tensor", "all-reduce", all_reduced(whole_bytes, parallel.tensor)),
        Transfer("matrices for Muon", "tensor", "all-gather", to_others(gathered, parallel.tensor)),
    ]
