"""Hash, distinct ids and gathers against torch, C and the demo's numpy, on row ids of real text."""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from engram_kernels import reference
from engram_kernels.gather_rows import gather_rows
from engram_kernels.ngram_hash import ngram_hash
from engram_kernels.row_state import SPLIT
from engram_kernels.unique_rows import unique_rows
from engram_megatron.benchmarks.measure import Candidate, Comparison, interleaved
from engram_megatron.benchmarks.row_ids import TextTokens
from engram_megatron.benchmarks.row_limits import compile_c_gather

LOOKUPS = 65_536  # one layer of 4096 tokens
ROW_DIM = 80  # Engram-27B: 160 bytes in bfloat16, 320 in float32
NUM_BATCHES = 13  # no multiple of a number of candidates, so that each meets all
TABLE_BYTES = 2 << 30

ROW_KINDS: tuple[tuple[str, np.dtype[Any]], ...] = (("160 B rows", SPLIT), ("320 B rows", np.dtype(np.float32)))


@dataclass(frozen=True)
class Setting:
    """What all comparisons share."""

    text: TextTokens
    num_threads: int
    repeats: int
    cpu_time: bool = False  # seconds of the processor instead of the clock on the wall

    def time(self, candidates: Mapping[str, Candidate], repeats: int) -> dict[str, float]:
        """Medians as `interleaved`."""
        return interleaved(candidates, repeats, clock=time.process_time if self.cpu_time else time.perf_counter)

    def batches(self, num_rows: int) -> Iterator[NDArray[np.int64]]:
        """Ids of one window after another, without end.

        Every call of a candidate takes other ids, as the steps of a training run do: a gather of the same rows again
        would find them in the cache.
        """
        return itertools.cycle([self.text.rows(LOOKUPS, num_rows, skip=window) for window in range(NUM_BATCHES)])


def hash_rows(setting: Setting) -> list[Comparison]:
    """Both layers' rows of 16 windows against the numpy of DeepSeek's demo."""
    hasher, tokens = setting.text.hasher, setting.text.tokens[:16]
    arguments = (
        hasher.compress(tokens),
        setting.text.documents[:16],
        hasher.multipliers_LN,
        hasher.primes_LOJ,
        hasher.row_offsets_LH,
        hasher.pad_id,
    )
    out = np.empty((*hasher.row_offsets_LH.shape[:1], *tokens.shape, hasher.row_offsets_LH.shape[1]), np.int64)
    np.testing.assert_array_equal(ngram_hash(*arguments), reference.ngram_hash(*arguments))
    candidates: dict[str, Candidate] = {
        "ours": lambda: ngram_hash(*arguments, out),
        "numpy": lambda: reference.ngram_hash(*arguments),
    }
    seconds = setting.time(candidates, setting.repeats)
    return [Comparison(f"hash of {tokens.size} tokens", seconds["ours"], "demo's numpy", seconds["numpy"], 7.0)]


def distinct(setting: Setting) -> list[Comparison]:
    """Distinct ids and their inverse, for one window and for a rank's share of a large batch."""
    large = _distinct(setting, 4 << 20, max(3, setting.repeats // 4))
    return [_distinct(setting, LOOKUPS, setting.repeats), large]


def _distinct(setting: Setting, num_lookups: int, repeats: int) -> Comparison:
    ids = setting.text.rows(num_lookups, setting.text.hasher.total_rows)
    tensor = torch.from_numpy(ids)
    candidates: dict[str, Candidate] = {
        "ours": lambda: unique_rows(ids),
        "torch": lambda: torch.unique(tensor, sorted=True, return_inverse=True),
    }
    seconds = setting.time(candidates, repeats)
    share = unique_rows(ids)[0].size / num_lookups
    return Comparison(
        f"distinct of {num_lookups} ids ({share:.2f})", seconds["ours"], "torch.unique", seconds["torch"], 2.0
    )


def gather(setting: Setting) -> list[Comparison]:
    """Copies of rows, repeats among them, and distinct rows first."""
    return [comparison for kind in ROW_KINDS for comparison in _gather(setting, *kind)]


def _gather(setting: Setting, kind: str, dtype: np.dtype[Any]) -> list[Comparison]:
    num_rows = TABLE_BYTES // (ROW_DIM * dtype.itemsize)
    weight = np.full((num_rows, ROW_DIM), 1, dtype)  # written, so that no page is the shared page of zeros
    out = np.zeros((LOOKUPS, ROW_DIM), dtype)
    torch_dtype = np.dtype(np.int16) if dtype == SPLIT else dtype  # torch indexes no uint16
    torch_weight, torch_out = torch.from_numpy(weight.view(torch_dtype)), torch.from_numpy(out.view(torch_dtype))
    batches = setting.batches(num_rows)

    def unique_gather() -> object:
        rows, inverse = unique_rows(next(batches))
        gather_rows(weight, rows, out[: rows.size])
        return inverse

    def unique_select() -> object:
        rows, inverse = torch.unique(torch.from_numpy(next(batches)), sorted=True, return_inverse=True)
        torch.index_select(torch_weight, 0, rows, out=torch_out[: rows.numel()])
        return inverse

    candidates: dict[str, Candidate] = {
        "ours": lambda: gather_rows(weight, next(batches), out),
        "select": lambda: torch.index_select(torch_weight, 0, torch.from_numpy(next(batches)), out=torch_out),
        "ours, distinct": unique_gather,
        "torch, distinct": unique_select,
    }
    with tempfile.TemporaryDirectory() as folder:
        in_c = compile_c_gather(Path(folder), setting.num_threads)
        if in_c is not None:
            candidates["C"] = lambda: in_c(weight, next(batches), out)
        s = setting.time(candidates, setting.repeats)
    versus_c = [] if in_c is None else [Comparison(f"gather, {kind}", s["ours"], "C", s["C"], 0.90)]
    unique_names = f"dedup + gather, {kind}", "torch.unique + index_select"
    return [
        *versus_c,
        Comparison(f"gather, {kind}", s["ours"], "index_select(out=)", s["select"], 0.95),
        Comparison(unique_names[0], s["ours, distinct"], unique_names[1], s["torch, distinct"], 2.0),
    ]
