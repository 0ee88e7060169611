"""Bytes that a forward pass leaves behind for its backward pass: all that stays alive, whoever holds it."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _NewStorages(TorchDispatchMode):
    """Every storage that an operation makes, with its size, held weakly."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        before = {_id(x) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and _id(tensor) not in before:
                storage = tensor.untyped_storage()
                self.made[_id(tensor)] = (StorageWeakRef(storage), storage.nbytes())
        return result


def _id(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def kept_bytes(forward: Callable[[], Any]) -> int:
    """Bytes of the storages made by `forward` that are alive while its result is, the result among them."""
    with _NewStorages() as storages:
        result = forward()
    gc.collect()
    kept = sum(size for reference, size in storages.made.values() if not reference.expired())
    del result
    return kept
