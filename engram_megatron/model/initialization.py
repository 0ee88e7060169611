"""Initial weights as a function of (seed, global name): the same for every layout and number of ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from engram_megatron.model.hyper_connection import HyperConnection
from engram_megatron.model.initial_values import initial_weight, weight_generator
from engram_megatron.model.parameter_names import global_named_parameters
from engram_megatron.model.tensor_shard import global_shape, take_shard


@torch.no_grad()
def initialize_weights(chunks: Sequence[nn.Module], *, seed: int, std: float) -> None:
    """Fill every parameter: hyper-connections by their own rule, all others with `initial_weight`.

    An expert or a layer gets the same values wherever it lives and whatever else the model holds. A tensor that is
    divided over tensor-parallel ranks is drawn whole, one at a time, and each rank keeps its part.
    """
    mhc_parameters = _reset_hyper_connections(chunks, seed)
    for name, parameter in global_named_parameters(chunks):
        if name not in mhc_parameters:
            whole = initial_weight(name, global_shape(parameter), seed=seed, std=std, device=parameter.device)
            parameter.copy_(take_shard(name, parameter, whole))


def _reset_hyper_connections(chunks: Sequence[nn.Module], seed: int) -> set[str]:
    names = {id(parameter): name for name, parameter in global_named_parameters(chunks)}
    done: set[str] = set()
    for module in (module for chunk in chunks for module in chunk.modules()):
        if isinstance(module, HyperConnection):
            name = names[id(module.mapping.weight)]
            module.reset_parameters(weight_generator(seed, name, module.mapping.weight.device))
            done.update(names[id(parameter)] for parameter in module.parameters())
    return done
