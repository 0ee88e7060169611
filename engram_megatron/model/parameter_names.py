"""Global names of parameters: the same whatever the pipeline stage, tensor or expert-parallel rank that holds them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from megatron.core import parallel_state
from torch import Tensor, nn

_LAYER = re.compile(r"(decoder\.layers\.)(\d+)(\.)")
_EXPERT = re.compile(r"(local_experts\.)(\d+)(\.)")


def global_named_parameters(chunks: Sequence[nn.Module]) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield (global name, parameter) of the model chunks of this rank, GPTModels wrapped or not.

    Layers are counted from the model's first, experts over all expert-parallel ranks; wrappers' `module.` is removed.
    """
    for chunk in map(unwrapped, chunks):
        yield from _renamed(chunk, chunk.named_parameters())


def global_named_buffers(chunks: Sequence[nn.Module]) -> Iterator[tuple[str, Tensor]]:
    """Yield (global name, buffer), named as the parameters are."""
    for chunk in map(unwrapped, chunks):
        yield from _renamed(chunk, chunk.named_buffers())


def unwrapped(chunk: nn.Module) -> Any:
    """The GPTModel inside the wrappers that keep what they wrap in `module`."""
    while hasattr(chunk, "module"):
        chunk = chunk.module  # type: ignore[assignment]
    return chunk


def _renamed(chunk: Any, named: Iterator[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    first_layer = chunk.decoder.layers[0].layer_number - 1
    expert_rank = parallel_state.get_expert_model_parallel_rank()
    for name, tensor in named:
        yield _global_name(name, first_layer, expert_rank, _experts_per_rank(chunk)), tensor


def _experts_per_rank(module: nn.Module) -> int:
    config: Any = module.config
    num_experts: int = config.num_moe_experts or 0
    ranks: int = parallel_state.get_expert_model_parallel_world_size()
    return num_experts // ranks


def _global_name(name: str, first_layer: int, expert_rank: int, experts_per_rank: int) -> str:
    name = _LAYER.sub(lambda m: f"{m[1]}{int(m[2]) + first_layer}{m[3]}", name)
    return _EXPERT.sub(lambda m: f"{m[1]}{int(m[2]) + expert_rank * experts_per_rank}{m[3]}", name)
