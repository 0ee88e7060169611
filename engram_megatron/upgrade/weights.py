"""A checkpoint's model, without the state of its optimizer."""

from __future__ import annotations

import torch

from engram_checkpoints.tensor_source import TensorSource

_OPTIMIZER_PREFIX = "optimizer."


class Weights:
    """The `TensorSource` of the weights (and balancing biases) of a backbone."""

    def __init__(self, source: TensorSource) -> None:
        self._source = source
        self.tensors = {n: info for n, info in source.tensors.items() if not n.startswith(_OPTIMIZER_PREFIX)}

    def read(self, name: str, rows: slice = slice(None)) -> torch.Tensor:
        """As of `TensorSource`."""
        return self._source.read(name, rows)
