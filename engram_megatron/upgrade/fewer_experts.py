"""A model with a part of its routed experts: which stay, and what their tensors are called then.

Kept experts are numbered anew in their order; the rows of the router and the balancing biases go with them. Nothing is
averaged or scaled: a token that chose kept experts only is computed as before.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from engram_checkpoints.tensor_source import TensorInfo, TensorSource
from engram_megatron.errors import UsageError

_EXPERT = re.compile(r"(.+)\.mlp\.experts\.experts\.(\d+)\.(.+)")
_ROUTER = re.compile(r"(.+)\.mlp\.router\.(?:weight|expert_bias)")

Kept = Mapping[str, tuple[int, ...]]  # layer, as tensors name it ("decoder.layers.1"): experts, rising


def most_wanted(source: TensorSource, num_kept: int) -> Kept:
    """In each layer the experts with the lowest balancing bias, of equal ones the first.

    Loss-free balancing lowers the bias of an expert that gets more tokens than the mean and raises it otherwise
    (arXiv 2408.15664), so it says how many tokens the router's own scores would give the expert.
    """
    kept = {}
    for layer in _layers(source):
        bias = source.read(f"{layer}.mlp.router.expert_bias")
        kept[layer] = tuple(sorted(bias.argsort(stable=True)[:num_kept].tolist()))
    return kept


def read_kept(path: Path, source: TensorSource, num_kept: int) -> Kept:
    """The experts that a JSON file names, `{"decoder.layers.1": [0, 3, ...], ...}`, in every layer with experts.

    Raises `UsageError` for what is no such file.
    """
    try:
        chosen: Any = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read as JSON: {error}") from error
    layers = _layers(source)
    if not isinstance(chosen, dict) or sorted(chosen) != sorted(layers):
        raise UsageError(f"{path} must list the experts to keep of each of {', '.join(layers)}, and of no other layer")
    for layer, experts in chosen.items():
        present = source.tensors[f"{layer}.mlp.router.weight"].shape[0]
        valid = isinstance(experts, list) and all(type(e) is int and 0 <= e < present for e in experts)
        if not valid or len(set(experts)) != num_kept or len(experts) != num_kept:
            raise UsageError(
                f"{path}: {layer} must name {num_kept} (model.moe.num_experts) different experts of 0..{present - 1}"
            )
    return {layer: tuple(sorted(experts)) for layer, experts in chosen.items()}


class FewerExperts:
    """The `TensorSource` of a model without the experts that are not `kept`."""

    def __init__(self, source: TensorSource, kept: Kept) -> None:
        self._source, self._kept = source, kept
        self._names = {ours: name for name in source.tensors if (ours := self._name(name)) is not None}
        self.tensors = {ours: self._info(name) for ours, name in self._names.items()}

    def read(self, name: str, rows: slice = slice(None)) -> torch.Tensor:
        """As of `TensorSource`."""
        router = _ROUTER.fullmatch(name)
        if router is None:
            return self._source.read(self._names[name], rows)
        return self._source.read(name)[list(self._kept[router[1]])][rows]

    def _name(self, name: str) -> str | None:
        """What the source's tensor is called here; None where it is left out."""
        expert = _EXPERT.fullmatch(name)
        if expert is None:
            return name
        layer, number, rest = expert[1], int(expert[2]), expert[3]
        if number not in self._kept[layer]:
            return None
        return f"{layer}.mlp.experts.experts.{self._kept[layer].index(number)}.{rest}"

    def _info(self, name: str) -> TensorInfo:
        info, router = self._source.tensors[name], _ROUTER.fullmatch(name)
        return info if router is None else TensorInfo((len(self._kept[router[1]]), *info.shape[1:]), info.dtype)


def _layers(source: TensorSource) -> list[str]:
    """Those with routed experts."""
    return list(dict.fromkeys(router[1] for name in source.tensors if (router := _ROUTER.fullmatch(name))))
