"""Collectives of parameters and their gradients, once in a step. Conventions: see `traffic`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from engram_megatron.config import RunConfig
from engram_megatron.model.counts import TensorSpec
from engram_megatron.model.placement import (
    EMBEDDING,
    ROUTED,
    buffer_elements,
    gradient_bytes,
    gradient_ranks,
    is_tensor_divided,
    rank_elements,
    specs_on,
    weight_bytes,
)
from engram_megatron.model.transfers import Group, Transfer, all_reduced, to_others


def gradient_transfers(config: RunConfig, world_size: int, pipeline_rank: int) -> list[Transfer]:
    """Over the replicas: sums of gradients, and with the distributed optimizer the new weights."""
    specs = specs_on(config, pipeline_rank)
    dense = [spec for spec in specs if spec.placed_as != ROUTED]
    experts = [spec for spec in specs if spec.placed_as == ROUTED]
    transfers = _over_replicas(config, world_size, dense, "dense", "data")
    # Where no group of ranks differs for them, megatron-core treats routed experts as all else.
    apart = config.parallel.expert > 1 or config.parallel.tensor > 1
    return transfers + _over_replicas(config, world_size, experts, "routed experts", "expert data" if apart else "data")


def _over_replicas(
    config: RunConfig, world_size: int, specs: Sequence[TensorSpec], kind: str, group: Group
) -> list[Transfer]:
    if not specs:
        return []
    ranks = gradient_ranks(specs[0], config.parallel, world_size)
    held = [(buffer_elements(spec, config.parallel), spec) for spec in specs]
    gradients = sum(elements * gradient_bytes(spec, config) for elements, spec in held)
    if not config.parallel.distributed_optimizer:
        return [Transfer(f"gradients, {kind}", group, "all-reduce", all_reduced(gradients, ranks))]
    weights = sum(elements * weight_bytes(spec, config) for elements, spec in held)
    # A replica has the sums of an equal share of the buffer, and sends on what belongs to tensors of other owners; the
    # owners send weights back alike. Estimated as if owners were drawn by lot.
    return [
        Transfer(f"gradients, {kind}", group, "reduce-scatter", to_others(gradients, ranks)),
        Transfer(f"gradients to owners, {kind} (estimate)", group, "all-to-all", to_others(gradients / ranks, ranks)),
        Transfer(f"weights from owners, {kind} (estimate)", group, "all-to-all", to_others(weights / ranks, ranks)),
        Transfer(f"weights, {kind}", group, "all-gather", to_others(weights, ranks)),
    ]


def embedding_transfers(config: RunConfig, pipeline_rank: int) -> list[Transfer]:
    """Multi-token prediction embeds tokens on the last pipeline rank: the gradients of two copies are summed."""
    last = config.parallel.pipeline - 1
    if config.model.mtp.num_layers == 0 or last == 0 or pipeline_rank not in (0, last):
        return []
    sizes = [
        rank_elements(spec, config.parallel) * gradient_bytes(spec, config)
        for spec in specs_on(config, pipeline_rank)
        if spec.part == EMBEDDING
    ]
    return [Transfer("gradients, both embeddings", "embedding", "all-reduce", all_reduced(sum(sizes), 2))]


def tensor_rank_transfers(
    config: RunConfig, world_size: int, pipeline_rank: int, takes_muon: Callable[[TensorSpec], bool]
) -> list[Transfer]:
    """Between tensor ranks: gradients of what each holds whole but saw a slice of the sequence with, and Muon's
    all-gathers of the matrices of which each holds a part; with the distributed optimizer a replica gathers those that
    it owns, the mean over replicas is given."""
    parallel = config.parallel
    specs = [spec for spec in specs_on(config, pipeline_rank) if spec.placed_as != ROUTED]
    whole = [spec for spec in specs if not is_tensor_divided(spec)]
    # megatron-core flattens them into one tensor, which takes the widest dtype
    whole_bytes = sum(spec.count for spec in whole) * max((gradient_bytes(spec, config) for spec in whole), default=0)
    gathered = sum(
        spec.count * gradient_bytes(spec, config) for spec in specs if is_tensor_divided(spec) and takes_muon(spec)
    )
    name = "matrices for Muon"
    if parallel.distributed_optimizer:
        name, gathered = f"{name} (mean)", gathered // (parallel.data(world_size) * parallel.context)
    return [
        Transfer("gradients, whole on tensor ranks", "tensor", "all-reduce", all_reduced(whole_bytes, parallel.tensor)),
        Transfer(name, "tensor", "all-gather", to_others(gathered, parallel.tensor)),
    ]
