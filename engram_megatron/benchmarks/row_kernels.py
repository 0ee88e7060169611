"""The kernels on table rows against torch, C and the bare traffic, on row ids of real text.

Every call takes other ids (one of `NUM_BATCHES` windows in turn), as the steps of a training run do: a gather of the
same rows again would find them in the cache.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from numpy.typing import NDArray

from engram_kernels import reference
from engram_kernels.catch_up import CatchUp
from engram_kernels.gather_rows import gather_rows
from engram_kernels.ngram_hash import ngram_hash
from engram_kernels.row_adam import read_rows, update_rows
from engram_kernels.row_state import SPLIT, RowState, row_bytes, zero_rows
from engram_kernels.segment_sum import sum_pieces
from engram_kernels.unique_rows import unique_rows
from engram_megatron.benchmarks.measure import Candidate, Comparison, interleaved
from engram_megatron.benchmarks.row_ids import TextTokens
from engram_megatron.benchmarks.row_limits import compile_c_gather, dense_sweep, read_modify_write

LOOKUPS = 65_536  # one layer of 4096 tokens
ROW_DIM = 80  # Engram-27B: 160 bytes in bfloat16, 320 in float32
NUM_BATCHES = 13  # no multiple of a number of candidates, so that each meets all
TABLE_BYTES = 2 << 30
BETAS, EPS, LR = (0.9, 0.95), 1e-20, 1e-3
PAST_STEPS = 200  # of which a table in use remembers rows

ROW_DTYPES = {"160 B rows": SPLIT, "320 B rows": np.dtype(np.float32)}


@dataclass(frozen=True)
class Setting:
    """What all comparisons share."""

    text: TextTokens
    num_threads: int
    repeats: int

    def batches(self, num_rows: int) -> Iterator[NDArray[np.int64]]:
        """Ids of one window after another, without end."""
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
    np.testing.assert_array_equal(ngram_hash(*arguments), reference.ngram_hash(*arguments))
    candidates: dict[str, Candidate] = {
        "ours": lambda: ngram_hash(*arguments),
        "numpy": lambda: reference.ngram_hash(*arguments),
    }
    seconds = interleaved(candidates, setting.repeats)
    return [Comparison(f"hash of {tokens.size} tokens", seconds["ours"], "demo's numpy", seconds["numpy"], 7.0)]


def gather(setting: Setting) -> list[Comparison]:
    """Copies of rows, repeats among them, and distinct rows first."""
    found = []
    for name, dtype in ROW_DTYPES.items():
        num_rows = TABLE_BYTES // (ROW_DIM * dtype.itemsize)
        weight = np.full((num_rows, ROW_DIM), 1, dtype)  # written, so that no page is the shared page of zeros
        torch_weight = torch.from_numpy(weight.view(np.int16 if dtype == SPLIT else dtype))
        out = np.zeros((LOOKUPS, ROW_DIM), dtype)
        torch_out = torch.from_numpy(out.view(np.int16 if dtype == SPLIT else dtype))
        batches = setting.batches(num_rows)

        def select() -> None:
            torch.index_select(torch_weight, 0, torch.from_numpy(next(batches)), out=torch_out)  # noqa: B023

        def unique_gather() -> NDArray[np.int64]:
            rows, inverse = unique_rows(next(batches))  # noqa: B023
            gather_rows(weight, rows, out[: rows.size])  # noqa: B023
            return inverse

        def unique_select() -> torch.Tensor:
            rows, inverse = torch.unique(torch.from_numpy(next(batches)), sorted=True, return_inverse=True)  # noqa: B023
            torch.index_select(torch_weight, 0, rows, out=torch_out[: rows.numel()])  # noqa: B023
            return inverse

        candidates: dict[str, Candidate] = {
            "ours": lambda: gather_rows(weight, next(batches), out),  # noqa: B023
            "index_select": select,
            "ours, distinct": unique_gather,
            "torch, distinct": unique_select,
        }
        with tempfile.TemporaryDirectory() as folder:
            in_c = compile_c_gather(Path(folder), setting.num_threads)
            if in_c is not None:
                candidates["C"] = lambda: in_c(weight, next(batches), out)  # type: ignore[misc]  # noqa: B023
            seconds = interleaved(candidates, setting.repeats)
        if in_c is not None:
            found.append(Comparison(f"gather, {name}", seconds["ours"], "C", seconds["C"], 0.90))
        found += [
            Comparison(f"gather, {name}", seconds["ours"], "index_select(out=)", seconds["index_select"], 0.95),
            Comparison(
                f"dedup + gather, {name}",
                seconds["ours, distinct"],
                "torch.unique + index_select",
                seconds["torch, distinct"],
                2.0,
            ),
        ]
    return found


def distinct(setting: Setting) -> list[Comparison]:
    """Distinct ids and their inverse, for one window and for a rank's share of a large batch."""
    found = []
    for num_lookups, repeats in ((LOOKUPS, setting.repeats), (4 << 20, max(3, setting.repeats // 4))):
        ids = setting.text.rows(num_lookups, setting.text.hasher.total_rows)
        tensor = torch.from_numpy(ids)
        candidates: dict[str, Candidate] = {
            "ours": lambda: unique_rows(ids),  # noqa: B023
            "torch": lambda: torch.unique(tensor, sorted=True, return_inverse=True),  # noqa: B023
        }
        seconds = interleaved(candidates, repeats)
        share = unique_rows(ids)[0].size / num_lookups
        name = f"distinct of {num_lookups} ids ({share:.2f})"
        found.append(Comparison(name, seconds["ours"], "torch.unique", seconds["torch"], 2.0))
    return found


def used_table(dtype: np.dtype[Any], num_rows: int) -> tuple[RowState, CatchUp]:
    """A table all of whose rows had a gradient in one of the last `PAST_STEPS` steps, and its history."""
    table = zero_rows(num_rows, ROW_DIM, dtype)
    for start in range(0, num_rows, 1 << 16):
        block = table.state[start : start + (1 << 16)]
        block[:, :ROW_DIM], block[:, ROW_DIM : 2 * ROW_DIM] = 1e-4, 1e-6
        table.set_master(slice(start, start + len(block)), np.full((len(block), ROW_DIM), 0.02, np.float32))
    table.last_step[:] = np.random.default_rng(0).integers(1, PAST_STEPS, num_rows)
    catch_up = CatchUp(*BETAS, EPS)
    for _ in range(PAST_STEPS):
        catch_up.advance(LR)
    return table, catch_up


def read(setting: Setting) -> list[Comparison]:
    """Rows as of the current step out of a table in use, where nearly every row missed some steps."""
    found = []
    for name, dtype in ROW_DTYPES.items():
        table, catch_up = used_table(dtype, TABLE_BYTES // row_bytes(dtype, ROW_DIM))
        batches, out = setting.batches(table.num_rows), np.zeros((LOOKUPS, ROW_DIM), dtype)
        candidates: dict[str, Candidate] = {
            "read": lambda: read_rows(table, next(batches), out, catch_up),  # noqa: B023
            "gather": lambda: gather_rows(table.weight, next(batches), out),  # noqa: B023
        }
        seconds = interleaved(candidates, setting.repeats)
        found.append(Comparison(f"read caught up, {name}", seconds["read"], "gather alone", seconds["gather"]))
    return found


def update(setting: Setting) -> list[Comparison]:
    """Gradients of lookups summed by row, then Adam on the rows."""
    found = []
    gradients = np.random.default_rng(0).standard_normal((LOOKUPS, ROW_DIM)).astype(np.float32) * np.float32(1e-3)
    for name, dtype in ROW_DTYPES.items():
        table, catch_up = used_table(dtype, TABLE_BYTES // row_bytes(dtype, ROW_DIM))
        batches = setting.batches(table.num_rows)
        parameter = torch.nn.Parameter(torch.full((table.num_rows, ROW_DIM), 0.02))
        optimizer = torch.optim.SparseAdam([parameter], lr=LR, betas=BETAS, eps=EPS)

        def ours() -> None:
            summed = sum_pieces(next(batches), [gradients])  # noqa: B023
            update_rows(table, summed.rows, summed.sums, catch_up, LR)  # noqa: B023
            catch_up.advance(LR)  # noqa: B023

        def torchs() -> None:
            ids = torch.from_numpy(next(batches))  # noqa: B023
            values = torch.from_numpy(gradients)
            parameter.grad = torch.sparse_coo_tensor(ids[None], values, parameter.shape, check_invariants=False)  # noqa: B023
            optimizer.step()  # noqa: B023

        as_integers = table.weight.view(np.uint16 if dtype == SPLIT else np.uint32), table.state.view(np.uint32)
        distinct_rows = itertools.cycle([unique_rows(next(batches))[0] for _ in range(NUM_BATCHES)])

        def limit() -> None:
            read_modify_write(*as_integers, next(distinct_rows))  # noqa: B023

        candidates: dict[str, Candidate] = {"ours": ours, "torch": torchs, "limit": limit}
        seconds = interleaved(candidates, setting.repeats)
        label = f"sum + Adam, {name}"
        found += [
            Comparison(label, seconds["ours"], "torch SparseAdam, float32", seconds["torch"], 3.5),
            Comparison(label, seconds["ours"], "read + write of the records", seconds["limit"], 0.25),
        ]
    return found


def update_or_sweep(setting: Setting) -> list[Comparison]:
    """Update of a share of all rows against a sweep over the whole table: where the sweep would be the better mode."""
    found = []
    table, catch_up = used_table(np.dtype(np.float32), TABLE_BYTES // row_bytes(np.float32, ROW_DIM))
    step = catch_up.step + 1
    correction = (1 - BETAS[0] ** step, 1 / (1 - BETAS[1] ** step) ** 0.5)
    scalars = np.array([1 - BETAS[0], BETAS[1], 1 - BETAS[1], LR / correction[0], correction[1], EPS], np.float32)
    for percent in (5, 20, 50):
        rng = np.random.default_rng(percent)
        rows = np.flatnonzero(rng.random(table.num_rows) < percent / 100)
        gradients = np.full((rows.size, ROW_DIM), 1e-3, np.float32)

        def sparse() -> None:
            update_rows(table, rows, gradients, catch_up, LR)  # noqa: B023
            catch_up.advance(LR)

        def sweep() -> None:
            dense_sweep(table.weight, table.state, table.last_step, rows, gradients, catch_up.step, tuple(scalars))  # noqa: B023

        seconds = interleaved({"sparse": sparse, "sweep": sweep}, max(3, setting.repeats // 4))
        name = f"update of {percent} % of rows"
        found.append(Comparison(name, seconds["sparse"], "dense sweep", seconds["sweep"], 0.90))
    return found


def whole_path(setting: Setting) -> list[Comparison]:
    """Hash, distinct rows, read, sum and update of both layers on one core; times are per token."""
    windows, num_rows = 16, 6_000_000
    found = []
    for name, dtype in ROW_DTYPES.items():
        table, catch_up = used_table(dtype, num_rows)
        starts = itertools.cycle(range(0, len(setting.text.tokens) - windows, windows))

        def step() -> None:
            start = next(starts)  # noqa: B023
            ids = setting.text.rows(windows * 4096 * 32, num_rows, skip=start)
            rows, _ = unique_rows(ids)
            out = np.empty((rows.size, ROW_DIM), dtype)  # noqa: B023
            read_rows(table, rows, out, catch_up)  # noqa: B023
            summed = sum_pieces(rows, [gradients[: rows.size]])  # noqa: B023
            update_rows(table, summed.rows, summed.sums, catch_up, LR)  # noqa: B023
            catch_up.advance(LR)  # noqa: B023

        gradients = np.full((windows * 4096 * 32, ROW_DIM), 1e-3, np.float32)
        numba.set_num_threads(1)
        try:
            seconds = interleaved({"step": step}, max(3, setting.repeats // 4))["step"]
        finally:
            numba.set_num_threads(setting.num_threads)
        per_token = seconds / (windows * 4096)
        found.append(Comparison(f"host path per token, {name}, one core", per_token, "100,000 tokens/s", 1e-5, 1.0))
    return found
