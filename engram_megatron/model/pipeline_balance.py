"""Layers dealt to the chunks of a pipeline so that the slowest chunk is as fast as can be.

The cost of a layer is its time in FLOP equivalents per token, forward and backward: what `flops` counts, plus a charge
for the parts that wait for memory and not for arithmetic, bytes moved times `FLOPS_PER_BYTE`. Bytes are those of a
fused implementation, every tensor read or written once (C hidden size, n streams, S streams of Engram, V vocabulary):
    hyper-connections   per sub-layer the streams read twice and written once, input and output of the sub-layer:
                        (3n + 2) C values; a plain residual sum 3C
    Engram              keys, value and streams read, gated values written, read again with the streams, streams
                        written: (6S + 1) C values
    loss                logits read, softmax written in float32 at least, and both again for the gradient
Norms, activations and the experts' permutations are left out: nearly alike in all layers, they change no balance. The
backward pass moves twice the bytes of the forward pass, as it computes twice the FLOPs. The embedding costs a look-up
per token: nothing. The last chunk has the head, the loss and multi-token prediction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from engram_megatron.config import RunConfig
from engram_megatron.config_fields import DTYPE_BYTES
from engram_megatron.model.counts import engram_streams
from engram_megatron.model.flops import BACKWARD_PER_FORWARD, TokenFlops, layer_flops, outer_flops

# FLOPs that a GPU does in the time in which it moves a byte: an H100 at half of its peak in bfloat16 (989 TFLOP/s) and
# all of its bandwidth (3.35 TB/s). An H200 has 103, a B200 about 140.
FLOPS_PER_BYTE = 150


@dataclass(frozen=True)
class Cost:
    """Time in FLOP equivalents per token. Integers, so that equal sums compare equal on every rank."""

    forward: int
    backward: int  # with what is computed again for it

    @property
    def total(self) -> int:
        return self.forward + self.backward

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.forward + other.forward, self.backward + other.backward)


@dataclass(frozen=True)
class ModelCosts:
    """`layers`: of every decoder layer; `last`: what the last chunk does besides."""

    layers: tuple[Cost, ...]
    last: Cost

    def chunks(self, num_layers: Sequence[int]) -> list[Cost]:
        """The cost of each chunk that a microbatch visits, given its number of layers."""
        costs, first = [], 0
        for count in num_layers:
            costs.append(sum(self.layers[first : first + count], Cost(0, 0)))
            first += count
        return [*costs[:-1], costs[-1] + self.last]


def model_costs(config: RunConfig) -> ModelCosts:
    """Costs of all parts of `config`, for its dtype, sequence length and recomputation."""
    engram_layers = () if config.engram is None else config.engram.layer_numbers
    layers = tuple(
        _layer_cost(config, flops, layer + 1 in engram_layers) for layer, flops in enumerate(layer_flops(config))
    )
    outer = outer_flops(config)
    passes = 1 + (outer.multi_token_prediction > 0)  # multi-token prediction has a loss of its own
    moved = FLOPS_PER_BYTE * passes * _loss_bytes(config)
    forward = outer.forward + moved
    again = 0
    if outer.multi_token_prediction > 0:  # its layer is of the kind of the last one, without Engram
        like_last = _layer_cost(config, layer_flops(config)[-1], has_engram=False)
        again = like_last.backward - BACKWARD_PER_FORWARD * like_last.forward
    return ModelCosts(layers, Cost(forward, BACKWARD_PER_FORWARD * outer.forward + moved + again))


def balanced_layers(costs: ModelCosts, ranks: int, chunks_per_rank: int) -> tuple[int, ...]:
    """Layers of each chunk in the order in which a microbatch visits them, at least one in each: the contiguous
    partition with the least cost of the slowest chunk.

    Among several, the one whose chunks differ least (least sum of squared costs), then the one with fewer layers in
    earlier chunks, which hold more microbatches. Exact, by dynamic programming over chunks x layers^2 states. With
    several chunks per rank, layers then move between chunks as long as that relieves the slowest rank and no chunk
    becomes slower than the slowest was.
    """
    num_chunks = ranks * chunks_per_rank
    assert 1 <= num_chunks <= len(costs.layers), (num_chunks, len(costs.layers))
    chunk_costs = _ChunkCosts(costs, num_chunks)
    limit = _least(chunk_costs, max, None)[0][0]
    assert limit is not None
    counts = _least_squares(chunk_costs, limit)
    if chunks_per_rank > 1:
        counts = _relieve_ranks(costs, counts, ranks, limit)
    assert sum(counts) == len(costs.layers)
    return tuple(counts)


def _least_squares(costs: _ChunkCosts, limit: int) -> list[int]:
    least = _least(costs, lambda one, rest: one * one + rest, limit)
    counts, first = [], 0
    for chunk in range(costs.num_chunks):
        target, rest = least[chunk][first], least[chunk + 1]
        for end in range(first + 1, costs.num_layers + 1):
            cost, after = costs.of(chunk, first, end), rest[end]
            if cost <= limit and after is not None and cost * cost + after == target:
                counts.append(end - first)
                first = end
                break
    return counts


def _relieve_ranks(costs: ModelCosts, counts: list[int], ranks: int, limit: int) -> list[int]:
    """Steepest descent over moves of one layer from one chunk to another, in (slowest rank, sum of squared ranks)."""

    def load(counts: list[int]) -> tuple[int, int]:
        chunks = [cost.total for cost in costs.chunks(counts)]
        of_ranks = [sum(chunks[rank::ranks]) for rank in range(ranks)]
        allowed = min(counts) > 0 and max(chunks) <= limit
        return (max(of_ranks), sum(cost * cost for cost in of_ranks)) if allowed else (sum(chunks) + 1, 0)

    while True:
        moves = (_moved(counts, i, j) for i in range(len(counts)) for j in range(len(counts)) if i != j)
        best = min(moves, key=load)
        if load(best) >= load(counts):
            return counts
        counts = best


def _moved(counts: list[int], source: int, target: int) -> list[int]:
    moved = list(counts)
    moved[source] -= 1
    moved[target] += 1
    return moved


class _ChunkCosts:
    """Costs of contiguous layers as one chunk, from prefix sums."""

    def __init__(self, costs: ModelCosts, num_chunks: int) -> None:
        self.num_layers, self.num_chunks, self.last = len(costs.layers), num_chunks, costs.last.total
        self.before = [0]
        for layer in costs.layers:
            self.before.append(self.before[-1] + layer.total)

    def of(self, chunk: int, first: int, end: int) -> int:
        """Chunk `chunk` with the layers `first` to `end` - 1."""
        return self.before[end] - self.before[first] + (self.last if chunk == self.num_chunks - 1 else 0)


def _least(costs: _ChunkCosts, join: Callable[[int, int], int], limit: int | None) -> list[list[int | None]]:
    """[chunk][first layer] -> least joint cost of that chunk and all later ones; None where nothing is possible."""
    layers, chunks = costs.num_layers, costs.num_chunks
    least: list[list[int | None]] = [[None] * (layers + 1) for _ in range(chunks + 1)]
    least[chunks][layers] = 0
    for chunk in reversed(range(chunks)):
        for first in range(layers):
            joined = []
            for end in range(first + 1, layers + 1):
                cost, rest = costs.of(chunk, first, end), least[chunk + 1][end]
                if rest is not None and (limit is None or cost <= limit):
                    joined.append(join(cost, rest))
            least[chunk][first] = min(joined, default=None)
    return least


def _layer_cost(config: RunConfig, flops: TokenFlops, has_engram: bool) -> Cost:
    """By the names of `training.recompute_modules`: what those name is computed once more before the backward pass."""
    forward = {
        "attention": flops.attention_projections,
        "core_attention": flops.attention_core,
        "feed_forward": flops.feed_forward + flops.router,
        "mhc": flops.hyper_connections + FLOPS_PER_BYTE * _stream_bytes(config),
        "engram": flops.engram + (FLOPS_PER_BYTE * _engram_bytes(config) if has_engram else 0),
    }
    again = forward if config.training.recompute == "full" else config.training.recomputed_modules
    once = sum(forward.values())
    return Cost(once, BACKWARD_PER_FORWARD * once + sum(forward[module] for module in again))


def _stream_bytes(config: RunConfig) -> int:
    """Both sub-layers of a layer, forward."""
    streams = config.model.mhc.num_streams
    values = 3 * streams + 2 if streams > 1 else 3
    return 2 * values * config.model.hidden_size * DTYPE_BYTES[config.training.dtype]


def _engram_bytes(config: RunConfig) -> int:
    return (6 * engram_streams(config) + 1) * config.model.hidden_size * DTYPE_BYTES[config.training.dtype]


def _loss_bytes(config: RunConfig) -> int:
    """Forward; the backward pass moves as much."""
    value_bytes = DTYPE_BYTES[config.training.dtype]
    return config.model.vocab_size * (value_bytes + max(4, value_bytes))
