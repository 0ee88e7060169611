"""The distributed optimizer's traffic: summed gradients to their owners, new weights to everybody.

megatron-core's DDP (`use_distributed_optimizer`) keeps weights and gradients in flat buckets and cuts each bucket into
equal shards, one per data replica, wherever the cuts fall. Owners are dealt by whole matrices (`ownership`), so

    reduce-scatter    DDP: replica r has the sum over replicas of shard r
    all-to-all        each element of a shard to the owner of its tensor
    update            the owner's Muon or Adam
    all-to-all        new weights back into the shards
    all-gather        DDP: every replica has every shard

The two all-to-alls move each element at most once over all replicas, 1 / replicas of what the ring collectives move.
Laying buckets out so that shards are whole matrices (megatron-core's layer-wise optimizer) would save them, but every
shard would be as large as the fullest: with fewer large matrices than replicas the buffers would grow without bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from engram_megatron.optimizer.backbone_tensors import BackboneTensor, UpdatedPart
from engram_megatron.optimizer.ownership import Dealt, Piece, deal


class ReplicaShards:
    """`parts` are what this rank owns of `tensors`, in their order. All methods are collective over the replicas."""

    def __init__(self, model_chunks: Sequence[Any], tensors: Sequence[BackboneTensor]):
        self._chunks = model_chunks
        self._exchanges: list[tuple[BucketExchange, list[UpdatedPart]]] = []
        parts: list[tuple[int, UpdatedPart]] = []
        for experts in (False, True):
            numbers = [number for number, tensor in enumerate(tensors) if tensor.is_expert == experts]
            buffers = [
                buffer
                for chunk in model_chunks
                for buffer in (chunk.expert_parallel_buffers if experts else chunk.buffers)
            ]
            if not buffers:
                continue
            group = tensors[numbers[0]].replica_group
            assert all(buffer.data_parallel_group == group for buffer in buffers)
            pieces = _pieces([tensors[number] for number in numbers], group.size())
            mine = {
                piece: UpdatedPart(tensors[number], piece.first_row, piece.end_row, is_only_owner=True)
                for number, of_tensor in zip(numbers, pieces, strict=True)
                for piece in of_tensor
                if piece.owner == group.rank()
            }
            parts += [(numbers[piece.tensor], part) for piece, part in mine.items()]
            by_parameter = {tensors[number].parameter: pieces[i] for i, number in enumerate(numbers)}
            for bucket in (bucket for buffer in buffers for bucket in buffer.buckets):
                placed = _placed(bucket, by_parameter)
                exchange = BucketExchange(bucket, group, [place for place, _ in placed])
                self._exchanges.append((exchange, [mine[piece] for _, piece in placed if piece in mine]))
        self.parts = [part for _, part in sorted(parts, key=lambda numbered: numbered[0])]

    def collect_gradients(self) -> None:
        """After DDP's reduce-scatter: `main.grad` of every part becomes its sum over the replicas."""
        for exchange, parts in self._exchanges:
            for part, gradient in zip(parts, exchange.collect_gradients(), strict=True):
                part.main.grad = gradient.view(part.main.shape)

    def share_weights(self) -> None:
        """Every replica takes the weights from their owners."""
        for exchange, _ in self._exchanges:
            exchange.return_weights()
        for chunk in self._chunks:
            chunk.start_param_sync()


class Place(NamedTuple):
    """Elements `start` .. `end` - 1 of a bucket, owned by replica `owner`."""

    start: int
    end: int
    owner: int


class BucketExchange:
    """Between equal shards of one bucket and the owners of its elements.

    `bucket` has flat `grad_data` and `param_data` of one length, divisible by the replicas of `group`. `places` rise
    and do not overlap; what lies between them is padding.
    """

    def __init__(self, bucket: Any, group: dist.ProcessGroup, places: Sequence[Place]):
        assert all(before.end <= after.start for before, after in pairwise(places))
        replicas, me = group.size(), group.rank()
        self._bucket, self._group = bucket, group
        shard = bucket.grad_data.numel() // replicas
        crossings = [
            (holder, place.owner, slice(max(place.start, holder * shard), min(place.end, (holder + 1) * shard)))
            for place in places
            for holder in range(place.start // shard, (place.end - 1) // shard + 1)
        ]
        # Sorted by owner, and in the bucket's order for each: so the owner receives its places in the bucket's order.
        self._held = [
            span for owner in range(replicas) for holder, to, span in crossings if (holder, to) == (me, owner)
        ]
        self._owned = [slice(place.start, place.end) for place in places if place.owner == me]
        self._held_counts, self._owned_counts = [0] * replicas, [0] * replicas
        for holder, owner, span in crossings:
            self._held_counts[owner] += _length(span) if holder == me else 0
            self._owned_counts[holder] += _length(span) if owner == me else 0

    def collect_gradients(self) -> list[torch.Tensor]:
        """The flat gradient of each place that this replica owns, in the bucket's order."""
        gradients = self._bucket.grad_data
        if self._group.size() == 1:
            return [gradients[span] for span in self._owned]
        received = self._send(gradients, self._held, self._held_counts, self._owned_counts)
        return list(received.split([_length(span) for span in self._owned]))

    def return_weights(self) -> None:
        """Put the weights of owned places, as they stand in this replica's bucket, into the shards that hold them."""
        if self._group.size() == 1:
            return
        weights = self._bucket.param_data
        received = self._send(weights, self._owned, self._owned_counts, self._held_counts)
        for span, values in zip(self._held, received.split([_length(span) for span in self._held]), strict=True):
            weights[span] = values

    def _send(
        self, flat: torch.Tensor, spans: Sequence[slice], sent_counts: list[int], received_counts: list[int]
    ) -> torch.Tensor:
        sent = torch.cat([flat[span] for span in spans]) if spans else flat.new_empty(0)
        received = flat.new_empty(sum(received_counts))
        dist.all_to_all_single(received, sent, received_counts, sent_counts, group=self._group)
        return received


def _pieces(tensors: Sequence[BackboneTensor], replicas: int) -> list[list[Piece]]:
    """The pieces of each tensor."""
    of_tensor: list[list[Piece]] = [[] for _ in tensors]
    dealt = [Dealt(rule=t.rule, whole_shape=t.whole_shape, local_rows=len(t.parameter)) for t in tensors]
    for piece in deal(dealt, replicas):
        of_tensor[piece.tensor].append(piece)
    return of_tensor


def _placed(bucket: Any, pieces: dict[torch.nn.Parameter, list[Piece]]) -> list[tuple[Place, Piece]]:
    """Where the pieces of a bucket's parameters stand in it, in its order."""
    placed = []
    for parameter in bucket.params_list:
        start, _ = bucket.param_to_index[parameter]
        row = parameter.numel() // len(parameter)
        placed += [
            (Place(start + piece.first_row * row, start + piece.end_row * row, piece.owner), piece)
            for piece in pieces[parameter]
        ]
    return sorted(placed, key=lambda each: each[0].start)


def _length(span: slice) -> int:
    return int(span.stop - span.start)
