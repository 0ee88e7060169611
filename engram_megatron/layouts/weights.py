"""Where the small model's weights start: away from the symmetric point, the same in every layout."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from torch import nn

from engram_megatron.model.parameter_names import global_named_parameters
from engram_megatron.model.tensor_shard import global_shape, take_shard


@torch.no_grad()
def roughen(chunks: Sequence[nn.Module]) -> None:
    """Add noise to every parameter, a function of its global name.

    The start is a symmetric point: all streams carry the same, so the gradient of every H_res is rounding noise, which
    Adam (epsilon 1e-20) turns into full steps in random directions. Away from it, two correct implementations agree.
    And a convolution that starts at zero would hide its own forward.
    """
    for name, parameter in global_named_parameters(chunks):
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        scale = 0.5 if "mhc_" in name else 0.1
        noise = torch.randn(global_shape(parameter), generator=generator, dtype=torch.float64) * scale
        parameter.add_(take_shard(name, parameter, noise))


@torch.no_grad()
def jitter_weights(chunks: Sequence[nn.Module], seed: int) -> None:
    """Change every weight by about one unit in its last place."""
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in global_named_parameters(chunks):
        noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        parameter.mul_(1 + torch.finfo(parameter.dtype).eps * noise)
