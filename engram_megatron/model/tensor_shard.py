"""Which part of a global tensor this tensor-parallel rank holds."""

from __future__ import annotations

import torch
from megatron.core import parallel_state
from torch import Tensor


def partition_dim(parameter: Tensor) -> int | None:
    """The dimension of `parameter` that is divided over the tensor-parallel ranks; None: every rank holds it whole.

    Routed experts are never divided: their tensor-parallel size is 1 in every layout.
    """
    is_expert = not getattr(parameter, "allreduce", True)
    divided = getattr(parameter, "tensor_model_parallel", False) and not is_expert
    if not divided or parallel_state.get_tensor_model_parallel_world_size() == 1:
        return None
    return int(parameter.partition_dim)  # type: ignore[attr-defined]


def global_shape(parameter: Tensor) -> torch.Size:
    """The shape of the tensor of which `parameter` is this rank's part."""
    shape, dim = list(parameter.shape), partition_dim(parameter)
    if dim is not None:
        shape[dim] *= parallel_state.get_tensor_model_parallel_world_size()
    return torch.Size(shape)


def take_shard(name: str, parameter: Tensor, whole: Tensor) -> Tensor:
    """This rank's part of `whole`, the global tensor called `name`; `whole` itself where `parameter` is not divided.

    Ranks hold consecutive rows or columns, but of a gated feed-forward's first matrix each its share of the gate and
    its share of the up projection, one below the other.
    """
    dim = partition_dim(parameter)
    if dim is None:
        return whole
    rank, ranks = (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_world_size(),
    )
    halves = whole.chunk(2) if name.endswith("linear_fc1.weight") else (whole,)
    return torch.cat([half.chunk(ranks, dim=dim)[rank] for half in halves])
