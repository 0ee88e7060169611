"""Activations that the backward pass computes again instead of keeping.

Everything here works on what one call was given; nothing is remembered on modules, so that several microbatches may be
between their forward and backward passes, in any order. Nothing random happens in a layer, and collectives inside what
is repeated run in the order of the backward pass, which is the same on all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from megatron.core import tensor_parallel
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

_Layout = tuple[tuple[int, ...], tuple[int, ...], int]  # shape, strides, offset


class SubLayerCall(Protocol):
    """How a block calls attention, feed-forward and memory: `call(function, x, *others)` is `function(x, *others)`."""

    def __call__(self, function: Callable[..., Tensor], x: Tensor, /, *others: Any) -> Tensor: ...


def call(function: Callable[..., Tensor], x: Tensor, /, *others: Any) -> Tensor:
    """The plain `SubLayerCall`: nothing is computed again."""
    return function(x, *others)


def run_again(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """`function(*arguments)`, all of whose activations are computed again in the backward pass; for functions that
    change no state but what they report, such as memory's mean gate."""
    result: Tensor = checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
    return result


def run_again_with_router(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """`run_again` for what may hold a router. megatron-core's checkpoint runs the first pass without gradients, which
    is how its routers know to count tokens once. `arguments` are tensors and Nones."""
    if not torch.is_grad_enabled():
        return function(*arguments)
    result: Tensor = tensor_parallel.checkpoint(function, False, *arguments)
    return result


def run_between_sub_layers_again(block: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """`block(sub_layer_call, *arguments)`, of which everything *outside* the sub-layer calls is computed again in the
    backward pass: mHC's own recomputation (arXiv 2512.24880, section 4.3.1).

    Kept are the tensors in `arguments`, the outputs of the sub-layers, and what the sub-layers themselves keep, but not
    their input `x`: that comes from the second pass over the block, which does not run the sub-layers again.
    """
    if not torch.is_grad_enabled():
        return block(call, *arguments)
    kept = _KeptOutputs()
    result: Tensor = checkpoint(
        block, kept, *arguments, use_reentrant=False, preserve_rng_state=False, context_fn=kept.passes
    )
    return result


class _KeptOutputs:
    """The sub-layer call of one pass over one block: in the forward pass it runs the function and keeps its output,
    in the second pass it hands out that output."""

    def __init__(self) -> None:
        self.outputs: list[Tensor] = []
        self.inputs: list[Tensor] = []  # of the second pass, equal to those of the first
        self.is_second_pass = False

    def passes(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """What torch's checkpoint runs the forward pass and its repetition under."""
        return self._pass(False), self._pass(True)

    @contextmanager
    def _pass(self, is_second: bool) -> Iterator[None]:
        self.is_second_pass = is_second
        self.inputs.clear()
        yield

    def __call__(self, function: Callable[..., Tensor], x: Tensor, /, *others: Any) -> Tensor:
        if self.is_second_pass:
            self.inputs.append(x.detach())
            return self.outputs[len(self.inputs) - 1].detach().requires_grad_()
        # These hooks stand before those of torch's checkpoint, which would drop what the function keeps.
        kept_input = _KeptInput(self.inputs, len(self.outputs), x)
        with saved_tensors_hooks(kept_input.pack, _unpack):
            output = function(x, *others)
        self.outputs.append(output.detach())
        return output


class _KeptInput:
    """Where the input of a sub-layer is found in the backward pass. Holds no tensor: what it would hold would stay."""

    def __init__(self, inputs: list[Tensor], place: int, x: Tensor) -> None:
        self.inputs = inputs
        self.place = place
        self.dtype = x.dtype
        self.address = x.untyped_storage().data_ptr()
        self.layout = _layout(x)

    def pack(self, tensor: Tensor) -> Tensor | _Part:
        """What a sub-layer keeps of `tensor`: nothing but its place, if it lies in the memory of the input."""
        if tensor.untyped_storage().data_ptr() == self.address and tensor.dtype == self.dtype:
            return _Part(self, _layout(tensor))
        return tensor

    def part(self, layout: _Layout) -> Tensor:
        """The part of the second pass's input at `layout`. That pass has been run by then: the backward pass of the
        write-back, which stands before that of the sub-layer, needs it."""
        x = self.inputs[self.place]
        assert _layout(x) == self.layout, "the second pass is unlike the first"
        return x.as_strided(*layout)


@dataclass(frozen=True)
class _Part:
    source: _KeptInput
    layout: _Layout


def _layout(tensor: Tensor) -> _Layout:
    return tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset())


def _unpack(saved: Tensor | _Part) -> Tensor:
    return saved.source.part(saved.layout) if isinstance(saved, _Part) else saved
