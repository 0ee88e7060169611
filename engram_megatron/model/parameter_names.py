"""Global names of parameters: the same whatever the pipeline stage, tensor or expert-parallel rank that holds them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from megatron.core import parallel_state
from torch import nn

_LAYER = re.compile(r"(decoder\.layers\.)(\d+)(\.)")
_EXPERT = re.compile(r"(local_experts\.)(\d+)(\.)")


def global_named_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield (global name, parameter) of a GPTModel, wrapped or not.

    Layers are counted from the model's first, experts over all expert-parallel ranks; wrappers' `module.` is removed.
    """
    while hasattr(module, "module"):
        module = module.module  # type: ignore[assignment]
    first_layer = module.decoder.layers[0].layer_number - 1 if len(module.decoder.layers) else 0  # type: ignore
    expert_rank = parallel_state.get_expert_model_parallel_rank()
    for name, parameter in module.named_parameters():
        yield _global_name(name, first_layer, expert_rank, _experts_per_rank(module)), parameter


def _experts_per_rank(module: nn.Module) -> int:
    config: Any = module.config
    num_experts: int = config.num_moe_experts or 0
    ranks: int = parallel_state.get_expert_model_parallel_world_size()
    return num_experts // ranks


def _global_name(name: str, first_layer: int, expert_rank: int, experts_per_rank: int) -> str:
    name = _LAYER.sub(lambda m: f"{m[1]}{int(m[2]) + first_layer}{m[3]}", name)
    return _EXPERT.sub(lambda m: f"{m[1]}{int(m[2]) + expert_rank * experts_per_rank}{m[3]}", name)
