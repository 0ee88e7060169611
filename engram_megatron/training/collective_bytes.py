"""Counts the bytes that this rank sends, by process group and kind of collective: for tests and benchmarks.

Counted at the communicator: `torch.distributed` turns every function (also inside coalescing, and under whatever name a
library imported it) into a method of `ProcessGroup`, and those are wrapped. What C++ starts by itself (functional
collectives of compiled graphs) is not seen; this project and megatron-core do not use them.

The convention is that of `model.traffic`: n ranks, payload of `size` bytes,
    all-reduce        2 (n - 1) / n of the reduced tensor, a ring
    all-gather          (n - 1) / n of the gathered tensor
    reduce-scatter      (n - 1) / n of the tensor before it is scattered
    all-to-all        what goes to other ranks
    broadcast           (n - 1) / n of the tensor: a pipelined ring, averaged over its ranks
    send              all of it
Receiving is not counted: it is another rank's sending.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor

from engram_megatron.model.transfers import Collective

# (group, the method's arguments) to bytes
Measure = Callable[..., float]


class Channel(NamedTuple):
    """Where bytes went: a process group by its name, and the kind of collective."""

    group: str
    collective: Collective


CollectiveBytes = Counter[Channel]


@contextmanager
def count_collective_bytes() -> Iterator[CollectiveBytes]:
    """Within the block, bytes that this rank sends add up in the counter. Not to be nested."""
    sent: CollectiveBytes = Counter()
    original = {name: getattr(dist.ProcessGroup, name) for name in _METHODS}
    for name, (collective, measure) in _METHODS.items():
        setattr(dist.ProcessGroup, name, _counting(original[name], collective, measure, sent))
    try:
        yield sent
    finally:
        for name, method in original.items():
            setattr(dist.ProcessGroup, name, method)


def _counting(method: Any, collective: Collective, measure: Measure, sent: CollectiveBytes) -> Any:
    def counted(group: dist.ProcessGroup, *args: Any, **kwargs: Any) -> Any:
        sent[Channel(group.group_name, collective)] += round(measure(group, *args))
        return method(group, *args, **kwargs)

    return counted


def _bytes(tensors: Any) -> int:
    """Of a tensor, or of a list (of lists) of tensors."""
    if isinstance(tensors, Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(_bytes(tensor) for tensor in tensors)


def _others(group: dist.ProcessGroup) -> float:
    """The share of a tensor that belongs to other ranks."""
    return (group.size() - 1) / group.size()


def _all_reduce(group: dist.ProcessGroup, tensors: Any, *_options: Any) -> float:
    return 2 * _others(group) * _bytes(tensors)


def _gathered(group: dist.ProcessGroup, output: Any, *_rest: Any) -> float:
    return _others(group) * _bytes(output)


def _scattered(group: dist.ProcessGroup, _output: Any, whole: Any, *_options: Any) -> float:
    return _others(group) * _bytes(whole)


def _all_to_all_base(
    group: dist.ProcessGroup,
    _output: Tensor,
    whole: Tensor,
    _output_splits: Sequence[int],
    input_splits: Sequence[int],
    *_options: Any,
) -> float:
    if not input_splits:  # equal parts
        return _others(group) * _bytes(whole)
    row_bytes = _bytes(whole) // max(whole.shape[0], 1)
    return (sum(input_splits) - input_splits[group.rank()]) * row_bytes


def _all_to_all(
    group: dist.ProcessGroup, _outputs: Sequence[Tensor], inputs: Sequence[Tensor], *_options: Any
) -> float:
    return sum(_bytes(tensor) for rank, tensor in enumerate(inputs) if rank != group.rank())


def _broadcast(group: dist.ProcessGroup, tensors: Any, *_options: Any) -> float:
    return _others(group) * _bytes(tensors)


def _send(_group: dist.ProcessGroup, tensors: Any, *_peer: Any) -> float:
    return _bytes(tensors)


# The Python methods behind all_reduce, all_gather(_into_tensor), reduce_scatter(_tensor), all_to_all(_single),
# broadcast and (i)send, with their coalesced forms.
_METHODS: dict[str, tuple[Collective, Measure]] = {
    "allreduce": ("all-reduce", _all_reduce),
    "allreduce_coalesced": ("all-reduce", _all_reduce),
    "allgather": ("all-gather", _gathered),
    "_allgather_base": ("all-gather", _gathered),
    "allgather_into_tensor_coalesced": ("all-gather", _gathered),
    "reduce_scatter": ("reduce-scatter", _scattered),
    "_reduce_scatter_base": ("reduce-scatter", _scattered),
    "reduce_scatter_tensor_coalesced": ("reduce-scatter", _scattered),
    "alltoall": ("all-to-all", _all_to_all),
    "alltoall_base": ("all-to-all", _all_to_all_base),
    "broadcast": ("broadcast", _broadcast),
    "send": ("send", _send),
}
