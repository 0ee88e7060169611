"""What a weight starts as: a function of (seed, global name), without a model."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

_ONES = ("layernorm.weight", "norm_query.weight", "norm_key.weight", "norm_conv.weight")
_ZEROS = ("short_conv.weight", ".bias")  # a zero convolution: Engram starts as its gated value (paper, section 2.3)


def initial_weight(
    name: str, shape: Sequence[int], *, seed: int, std: float, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """The whole tensor called `name`, float32 `shape`: norms 1, short convolution and biases 0, matrices N(0, std^2).

    Each tensor has a generator of its own. It is drawn in float32 so that runs in different dtypes start from the same
    numbers, up to rounding. Hyper-connections have their own rule and are not known here.
    """
    if name.endswith(_ONES):
        return torch.ones(*shape, dtype=torch.float32, device=device)
    if name.endswith(_ZEROS):
        return torch.zeros(*shape, dtype=torch.float32, device=device)
    assert len(shape) == 2, f"no initialisation rule for {name} {tuple(shape)}"
    weight = torch.empty(*shape, dtype=torch.float32, device=device)
    return weight.normal_(0.0, std, generator=weight_generator(seed, name, device))


def weight_generator(seed: int, name: str, device: torch.device | str) -> torch.Generator:
    """What the tensor called `name` is drawn from."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator(device=device).manual_seed(int.from_bytes(digest[:7], "little"))
