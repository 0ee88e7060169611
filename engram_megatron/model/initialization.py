"""Initial weights as a function of (seed, global name): the same for every layout and number of ranks."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import nn

from engram_megatron.model.hyper_connection import HyperConnection
from engram_megatron.model.parameter_names import global_named_parameters
from engram_megatron.model.tensor_shard import global_shape, take_shard

_ONES = ("layernorm.weight", "norm_query.weight", "norm_key.weight", "norm_conv.weight")
_ZEROS = ("short_conv.weight", ".bias")  # a zero convolution: Engram starts as its gated value (paper, section 2.3)


@torch.no_grad()
def initialize_weights(chunks: Sequence[nn.Module], *, seed: int, std: float) -> None:
    """Fill every parameter: norms 1, short convolution and biases 0, hyper-connections by their own rule, all other
    matrices from N(0, std^2).

    Each tensor has its own generator, seeded by a hash of (seed, global name), so that an expert or a layer gets the
    same values wherever it lives and whatever else the model holds. A tensor that is divided over tensor-parallel ranks
    is drawn whole, one at a time, and each rank keeps its part.
    """
    mhc_parameters = _reset_hyper_connections(chunks, seed)
    for name, parameter in global_named_parameters(chunks):
        if name in mhc_parameters:
            continue
        if name.endswith(_ONES):
            parameter.fill_(1.0)
        elif name.endswith(_ZEROS):
            parameter.zero_()
        else:
            assert parameter.dim() == 2, f"no initialisation rule for {name} {tuple(parameter.shape)}"
            # Drawn in float32 so that runs in different dtypes start from the same numbers, up to rounding.
            whole = torch.empty(global_shape(parameter), dtype=torch.float32, device=parameter.device)
            whole.normal_(0.0, std, generator=_generator(seed, name, parameter.device))
            parameter.copy_(take_shard(name, parameter, whole))


def _reset_hyper_connections(chunks: Sequence[nn.Module], seed: int) -> set[str]:
    names = {id(parameter): name for name, parameter in global_named_parameters(chunks)}
    done: set[str] = set()
    for module in (module for chunk in chunks for module in chunk.modules()):
        if isinstance(module, HyperConnection):
            name = names[id(module.mapping.weight)]
            module.reset_parameters(_generator(seed, name, module.mapping.weight.device))
            done.update(names[id(parameter)] for parameter in module.parameters())
    return done


def _generator(seed: int, name: str, device: torch.device) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator(device=device).manual_seed(int.from_bytes(digest[:7], "little"))
