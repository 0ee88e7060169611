"""Tables on a disk against tables in memory: which lookups of real text meet a row in memory, and what the rest costs.

One 2-gram head and one 3-gram head of the first Engram layer, whole, as a lazy shard of their own: a run that is short
for its tables, in which every row that was used once lies in the file or in memory. The text is read twice; shares and
times are those of the second time. Reads are of the distinct rows of a step, as of that step.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engram_kernels.catch_up import CatchUp
from engram_megatron.benchmarks.row_ids import WINDOW, TextTokens
from engram_megatron.optimizer.row_adam import RowAdam
from engram_megatron.tables.host_rows import HostPlacement
from engram_megatron.tables.nvme_placement import NvmePlacement
from engram_megatron.tables.nvme_rows import NvmeRows
from engram_megatron.tables.row_gradients import RowGradients
from engram_megatron.tables.row_layout import RowLayout
from engram_megatron.tables.row_store import Placement
from engram_megatron.tables.table_shard import TableShard

ROW_DIM = 80
HEADS = {"2-grams": 0, "3-grams": 8}  # of the first layer: the first of each order
STEP_WINDOWS = 16
HOT_OF_USED = 0.2
LR = 1e-3


@dataclass(frozen=True)
class Passes:
    """Of the second pass over the text: rows per second, and the share of lookups of each head that met a hot row."""

    reads: float
    updates: float
    shares: tuple[float, ...]


def head_rows(text: TextTokens) -> NDArray[np.int64]:
    """Row ids int64 [B, T, heads] of `HEADS`, numbered through, windows in a random order."""
    pieces: list[NDArray[np.int64]] = []
    for head in HEADS.values():
        first = int(text.hasher.row_offsets_LH[0, head])
        of_windows = [
            text.hasher.rows(text.tokens[b : b + 1], text.documents[b : b + 1])[0, ..., head] - first
            for b in range(len(text.tokens))
        ]
        before = 0 if not pieces else int(pieces[-1].max()) + 1
        pieces.append(np.concatenate(of_windows) + before)
    return np.stack(pieces, axis=-1)[np.random.default_rng(0).permutation(len(text.tokens))]


def train(ids: NDArray[np.int64], num_rows: int, placement: Placement, before: Callable[[TableShard], None]) -> Passes:
    """Two passes over `ids` int64 [B, T, heads]. `before` is called before every step and not timed."""
    shard = TableShard(RowLayout(num_rows, 4096, 1), 0, ROW_DIM, "bfloat16", placement=placement)
    shard.initialize(seed=1, std=0.02)
    adam = RowAdam(shard, CatchUp(0.9, 0.95, 1e-20))
    met, reads, updates = [], [], []
    starts = range(0, len(ids) - STEP_WINDOWS + 1, STEP_WINDOWS)
    for start in [*starts, *starts]:
        step_ids = ids[start : start + STEP_WINDOWS]
        rows = np.unique(step_ids)
        gradients = RowGradients.summed(rows, [np.full((rows.size, ROW_DIM), 1e-3, np.float32)])
        if isinstance(shard.store, NvmeRows):
            met.append((shard.store.place_of[step_ids] > 0).mean(axis=(0, 1)))
        before(shard)
        begun = time.perf_counter()
        shard.read_ahead(rows)
        shard.read(rows, adam.read_as_of)
        read = time.perf_counter()
        adam.step(gradients, LR)
        reads.append(rows.size / (read - begun))
        updates.append(rows.size / (time.perf_counter() - read))
    second = slice(len(starts), None)
    shares = tuple(np.mean(met[second], axis=0).tolist()) if met else ()
    return Passes(statistics.median(reads[second]), statistics.median(updates[second]), shares)


def lines(text: TextTokens, folder: Path | None = None) -> Iterator[str]:
    """The comparison as text. `folder`: on the disk to measure; None: where temporary files lie."""
    ids = head_rows(text)
    num_rows = int(ids.max()) + 1
    used, counts = np.unique(ids, return_counts=True)
    num_hot = int(HOT_OF_USED * used.size)
    yield (
        f"{len(HEADS)} heads of {num_rows} rows of {12 * ROW_DIM} B, {used.size} of them used; steps of "
        f"{STEP_WINDOWS * WINDOW} tokens; {num_hot} rows have a place in memory"
    )
    hottest = np.isin(ids, used[np.argsort(-counts, kind="stable")[:num_hot]]).mean(axis=(0, 1))
    with tempfile.TemporaryDirectory(dir=folder) as disk:
        placements: dict[str, tuple[Placement, Callable[[TableShard], None]]] = {
            "in memory": (HostPlacement(commit="lazy"), lambda _shard: None),
            "on a disk, file cached": (_on_disk(disk, num_hot / num_rows), lambda _shard: None),
            "on a disk, nothing cached": (_on_disk(disk, num_hot / num_rows), _drop_cache),
        }
        for name, (placement, before) in placements.items():
            found = train(ids, num_rows, placement, before)
            shares = [
                f"{kind} {share:.2f} (hottest rows of this text {best:.2f})"
                for kind, share, best in zip(HEADS, found.shares, hottest, strict=False)
            ]
            hot = f"; lookups that met a hot row: {', '.join(shares)}" if shares else ""
            yield f"{name:<26} {found.reads / 1e3:7.0f}k rows/s read, {found.updates / 1e3:6.0f}k updated{hot}"


def _on_disk(folder: str, hot_fraction: float) -> NvmePlacement:
    return NvmePlacement(folder=folder, hot_fraction=hot_fraction, commit="lazy")


def _drop_cache(shard: TableShard) -> None:
    """Have every page of the shard's file read from the disk again."""
    assert isinstance(shard.store, NvmeRows)
    shard.store.file.memory.drop_cache()
