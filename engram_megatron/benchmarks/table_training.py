"""Whole training steps of engram_tiny on one rank: with its tables in host memory, with the same tables as a plain
parameter under dense Adam, and with sixteen times the rows.

The backbone and the loop are the same, so a ratio says what the tables' path costs a step. The tables of the first two
are small, as engram_tiny's are; a plain parameter of a large table costs a sweep over all of it in every step.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from engram_data.batch import Batch, make_batch
from engram_megatron import platform
from engram_megatron.config import RunConfig
from engram_megatron.hashing.ngram_hasher import NgramHasher
from engram_megatron.hashing.vocab_projection import identity_projection
from engram_megatron.overrides import apply_overrides
from engram_megatron.presets import engram_tiny
from engram_megatron.tables.row_init import fill_initial_rows

ROUNDS, STEPS = 7, 4  # medians over rounds, in each of which every candidate takes so many steps in a row
SMALL_ROWS = 43_000  # of a head, 688,000 in all: 135 MB, more than the processor's cache
LARGE_FACTOR = 16
COST_TARGET, SIZE_TARGET = 1.10, 1.15


@dataclass(frozen=True)
class StepSeconds:
    """Medians of a step."""

    host: float
    parameter: float
    small: float
    large: float
    rows: tuple[int, int, int]  # of engram_tiny, small, large


def measure(rank: int, world_size: int, threads: int) -> StepSeconds:
    """On one forked rank."""
    from engram_megatron.layouts.rank_run import fresh_groups

    tiny = engram_tiny()
    ranks = fresh_groups(tiny, rank, world_size)
    small, large = (
        apply_overrides(tiny, [f"engram.rows_per_head={rows}"]) for rows in (SMALL_ROWS, SMALL_ROWS * LARGE_FACTOR)
    )
    runs = {
        "host": _Run(tiny, ranks),
        "parameter": _Run(tiny, ranks, is_parameter=True),
        "small": _Run(small, ranks),
        "large": _Run(large, ranks),
    }
    platform.limit_threads(threads)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for turn in range(ROUNDS + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            took = runs[name].take(STEPS)
            if turn > 0:
                seconds[name].append(took)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return StepSeconds(**medians, rows=(runs["host"].num_rows, runs["small"].num_rows, runs["large"].num_rows))


class _Run:
    """A model in training."""

    def __init__(self, config: RunConfig, ranks: Any, *, is_parameter: bool = False) -> None:
        from engram_megatron.model.backbone_config import TORCH_DTYPE
        from engram_megatron.model.builder import build_model_chunks, wrap_data_parallel
        from engram_megatron.optimizer.backbone import build_backbone_optimizer
        from engram_megatron.training.conditional_memory import ConditionalMemory
        from engram_megatron.training.trainer import Trainer

        assert config.engram is not None
        self.config = config
        vocabulary = config.model.vocab_size
        hasher = NgramHasher.from_config(config.engram, identity_projection(vocabulary), vocabulary)
        self.num_rows = hasher.total_rows
        memory: Any = _PlainTables(config, hasher) if is_parameter else ConditionalMemory(config, hasher, ranks)
        memory.initialize(config.training.seed)
        chunks = wrap_data_parallel(build_model_chunks(config), TORCH_DTYPE[config.training.dtype])
        self.trainer = Trainer(config, ranks, chunks, build_backbone_optimizer(chunks, config), None)
        self.trainer.memory = cast("ConditionalMemory", memory)
        self.memory = memory
        self.step = 0

    def take(self, num_steps: int) -> float:
        """Seconds per step over some steps, all that they asked for included."""
        batches = [_batches(step, self.config) for step in range(self.step, self.step + num_steps + 1)]
        started = time.perf_counter()
        for ahead in range(1, num_steps + 1):
            upcoming = batches[ahead] if ahead < num_steps else None
            self.trainer.train_step(self.step, batches[ahead - 1], stop_requested=False, next_batches=upcoming)
            self.step += 1
        self.memory.finish()
        return (time.perf_counter() - started) / num_steps


class _PlainTables:
    """Tables as a `torch.nn.Embedding` under `torch.optim.Adam`, with the methods of `ConditionalMemory` that a step
    calls."""

    def __init__(self, config: RunConfig, hasher: NgramHasher) -> None:
        assert config.engram is not None
        self.engram, self.hasher = config.engram, hasher
        self.multiplier = config.optimizer.table_learning_rate_multiplier
        self.embedding = torch.nn.Embedding(hasher.total_rows, config.engram.row_dim)
        betas = (config.optimizer.adam_beta1, config.optimizer.adam_beta2)
        parameters = self.embedding.parameters()
        self.adam = torch.optim.Adam(parameters, lr=0.0, betas=betas, eps=config.optimizer.adam_eps)

    def initialize(self, seed: int) -> None:
        fill_initial_rows(self.embedding.weight.detach().numpy(), 0, seed, self.engram.init_std)

    def plan(self, batches: Sequence[Batch]) -> _Ids:
        self.adam.zero_grad()
        ids = [self.hasher.rows(batch.tokens, batch.document_ids) for batch in batches]
        return _Ids([torch.from_numpy(rows) for rows in ids])

    def fetch(self, rows: _Ids) -> None:
        """Nothing: the rows are read when they are needed."""

    def of_microbatch(self, rows: _Ids, index: int, chunk: int = 0) -> torch.Tensor:
        memory: torch.Tensor = self.embedding(rows.of_microbatch[index])
        return memory.transpose(1, 2).flatten(-2)

    def return_gradients(self, rows: _Ids) -> _Norm:
        gradient = self.embedding.weight.grad
        assert gradient is not None
        return _Norm(float(gradient.square().sum()))

    def step(self, gradients: _Norm, learning_rate: float, gradient_scale: float) -> None:
        gradient = self.embedding.weight.grad
        assert gradient is not None
        gradient *= gradient_scale
        for group in self.adam.param_groups:
            group["lr"] = learning_rate * self.multiplier
        self.adam.step()
        self.adam.zero_grad()

    def statistics(self, rows: _Ids) -> None:
        return None

    def finish(self) -> None:
        """Nothing runs beside the caller."""


@dataclass
class _Ids:
    of_microbatch: list[torch.Tensor]
    wait_s: float = 0.0


@dataclass(frozen=True)
class _Norm:
    norm_squared: float


def _batches(step: int, config: RunConfig) -> list[Batch]:
    """The microbatches of a step: tokens drawn as frequent words are."""
    rng = np.random.default_rng(step)
    training, length = config.training, config.data.sequence_length
    windows = np.minimum(rng.zipf(1.2, (training.global_batch_size, length + 1)), config.model.vocab_size) - 1
    nowhere: NDArray[np.int64] = np.empty(0, np.int64)
    size = training.micro_batch_size
    starts = range(0, training.global_batch_size, size)
    return [make_batch(list(windows[start : start + size]), [nowhere] * size, True) for start in starts]


def lines(threads: int, run: Callable[..., list[StepSeconds]]) -> Iterator[str]:
    """The comparisons as text; `run` is `layouts.forked_ranks.run_ranks`."""
    (found,) = run(measure, 1, threads, timeout_s=900.0)
    tiny, small, large = found.rows
    yield _line(
        f"engram_tiny, {tiny} rows in host memory, against a plain parameter under dense Adam",
        found.host,
        found.parameter,
        COST_TARGET,
    )
    yield _line(f"{large} rows against {small}", found.large, found.small, SIZE_TARGET)


def _line(name: str, ours: float, other: float, most: float) -> str:
    verdict = "ok" if ours <= most * other else "short"
    times = f"{ours * 1e3:.0f} ms and {other * 1e3:.0f} ms, {ours / other:.2f}"
    return f"step: {name}: {times} (at most {most:.2f}: {verdict})"
