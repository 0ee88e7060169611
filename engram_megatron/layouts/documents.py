"""Two documents packed into one sequence must cost what they cost alone, wherever the layout cuts the sequence."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engram_data.batch import Batch
from engram_megatron.config import RunConfig
from engram_megatron.layouts.rank_run import SmallRun
from engram_megatron.layouts.small_model import GLOBAL_BATCH, LENGTH, VOCAB, microbatches


def packed_batch() -> Batch:
    """[GLOBAL_BATCH, LENGTH]: two documents per sequence, the border at another place in each. No loss is counted for
    the first token of a document."""
    rng = np.random.default_rng(17)
    window = rng.integers(0, VOCAB, (GLOBAL_BATCH, LENGTH + 1))
    borders = _borders()[:, None]
    place = np.arange(LENGTH)[None]
    return Batch(
        tokens=window[:, :-1].copy(),
        labels=window[:, 1:].copy(),
        loss_mask=place + 1 != borders,
        document_ids=(place >= borders).astype(np.int32),
    )


def packed_loss(rank: int, world_size: int, config: RunConfig) -> float:
    """On each rank of any layout: the mean loss in nats per token of `packed_batch`."""
    run = SmallRun(config, rank, world_size)
    size = config.training.micro_batch_size
    mine = microbatches(packed_batch(), size, run.ranks.data_rank, run.ranks.data_ranks)
    return run.trainer.validate(lambda _: mine, 1)


def loss_alone(rank: int, world_size: int, config: RunConfig) -> float:
    """On one rank: the same mean, from every document in a forward pass of its own."""
    run = SmallRun(config, rank, world_size)
    losses, tokens = [], []
    for document in _documents(packed_batch()):
        tokens.append(int(document.loss_mask.sum()))
        losses.append(run.trainer.validate(lambda _, alone=document: [alone], 1))  # type: ignore[misc]
    return float(np.average(losses, weights=tokens))


def _documents(batch: Batch) -> Sequence[Batch]:
    """Each document as a batch [1, its length]."""
    cuts = [(s, part) for s, border in enumerate(_borders()) for part in (slice(0, border), slice(border, LENGTH))]
    return [
        Batch(
            tokens=batch.tokens[s : s + 1, part],
            labels=batch.labels[s : s + 1, part],
            loss_mask=batch.loss_mask[s : s + 1, part],
            document_ids=np.zeros_like(batch.document_ids[s : s + 1, part]),
        )
        for s, part in cuts
    ]


def _borders() -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Where the second document of each sequence starts: from 3 to LENGTH - 5, at and beside the borders of slices."""
    return np.linspace(3, LENGTH - 5, GLOBAL_BATCH).astype(np.int64)
