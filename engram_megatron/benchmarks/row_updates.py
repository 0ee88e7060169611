"""Reads and updates of tables in use against torch, the bare traffic and a dense sweep, on row ids of real text."""

from __future__ import annotations

import itertools
from typing import Any

import numba
import numpy as np
import torch

from engram_kernels.catch_up import CatchUp
from engram_kernels.gather_rows import gather_rows
from engram_kernels.row_adam import is_for_sweep, read_rows, sweep_rows, update_rows
from engram_kernels.row_state import SPLIT, RowState, row_bytes, zero_rows
from engram_kernels.segment_sum import sum_pieces
from engram_kernels.unique_rows import unique_rows
from engram_megatron.benchmarks.measure import Candidate, Comparison
from engram_megatron.benchmarks.row_ids import WINDOW
from engram_megatron.benchmarks.row_kernels import LOOKUPS, NUM_BATCHES, ROW_DIM, ROW_KINDS, TABLE_BYTES, Setting
from engram_megatron.benchmarks.row_limits import dense_sweep, read_modify_write
from engram_megatron.gather.buffers import BufferPool

BETAS, EPS, LR = (0.9, 0.95), 1e-20, 1e-3
PAST_STEPS = 200  # in which the rows of a table in use had their last gradients
PATH_WINDOWS = 16  # of a step of the whole path
PATH_ROWS = 6_000_000


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
    """Distinct rows as of the current step out of a table in use, where nearly every row missed some steps."""
    return [_read(setting, *kind) for kind in ROW_KINDS]


def _read(setting: Setting, kind: str, dtype: np.dtype[Any]) -> Comparison:
    table, catch_up = used_table(dtype, TABLE_BYTES // row_bytes(dtype, ROW_DIM))
    batches = setting.batches(table.num_rows)
    rows = itertools.cycle([unique_rows(next(batches))[0] for _ in range(NUM_BATCHES)])
    out = np.zeros((LOOKUPS, ROW_DIM), dtype)

    def caught_up() -> None:
        some = next(rows)
        read_rows(table, some, out[: some.size], catch_up)

    def plain() -> None:
        some = next(rows)
        gather_rows(table.weight, some, out[: some.size])

    s = setting.time({"read": caught_up, "gather": plain}, setting.repeats)
    return Comparison(f"read caught up, {kind}", s["read"], "gather alone", s["gather"])


def update(setting: Setting) -> list[Comparison]:
    """Gradients of lookups summed by row, then Adam on the rows."""
    return [comparison for kind in ROW_KINDS for comparison in _update(setting, *kind)]


def _update(setting: Setting, kind: str, dtype: np.dtype[Any]) -> list[Comparison]:
    table, catch_up = used_table(dtype, TABLE_BYTES // row_bytes(dtype, ROW_DIM))
    gradients = np.random.default_rng(0).standard_normal((LOOKUPS, ROW_DIM)).astype(np.float32)
    batches = setting.batches(table.num_rows)
    rows = itertools.cycle([unique_rows(next(batches))[0] for _ in range(NUM_BATCHES)])
    parameter = torch.nn.Parameter(torch.full((table.num_rows, ROW_DIM), 0.02))
    optimizer = torch.optim.SparseAdam([parameter], lr=LR, betas=BETAS, eps=EPS)
    pool = BufferPool()  # as the lookup's
    weight_bits = table.weight.view(np.uint16 if dtype == SPLIT else np.uint32)

    def ours() -> None:
        summed = sum_pieces(next(batches), [gradients], pool.empty)
        update_rows(table, summed.rows, summed.sums, catch_up, LR)
        catch_up.advance(LR)

    def torchs() -> None:
        ids, values = torch.from_numpy(next(batches)), torch.from_numpy(gradients)
        parameter.grad = torch.sparse_coo_tensor(ids[None], values, parameter.shape, check_invariants=False)
        optimizer.step()

    candidates: dict[str, Candidate] = {
        "ours": ours,
        "torch": torchs,
        "limit": lambda: read_modify_write(weight_bits, table.state.view(np.uint32), next(rows)),
    }
    # The limit changes the lowest bits only, and changes them back when it meets a row again.
    s = setting.time(candidates, setting.repeats)
    return [
        Comparison(f"sum + Adam, {kind}", s["ours"], "torch SparseAdam, float32", s["torch"], 3.5),
        Comparison(f"sum + Adam, {kind}", s["ours"], "read + write of the records", s["limit"], 0.25),
    ]


def update_or_sweep(setting: Setting) -> list[Comparison]:
    """The two ways to dense Adam, an update of a share of the rows and a sweep over all of them, and which is chosen.

    The plain sweep is one that knows nothing of rows that missed steps, nor of moments that decay to nothing.
    """
    return [comparison for percent in (5, 20, 50) for comparison in _update_or_sweep(setting, percent)]


def _update_or_sweep(setting: Setting, percent: int) -> list[Comparison]:
    num_rows = TABLE_BYTES // row_bytes(np.float32, ROW_DIM)
    # Each way goes on with a table of its own: after a sweep no row has missed a step.
    (updated, of_updates), (swept, of_sweeps), (plain, _) = (used_table(np.dtype(np.float32), num_rows) for _ in "123")
    rng = np.random.default_rng(percent)
    # Other rows from step to step, as in training.
    batches = [np.flatnonzero(rng.random(num_rows) < percent / 100) for _ in range(4)]
    gradients = np.full((max(map(len, batches)), ROW_DIM), 1e-3, np.float32)
    rows = {name: itertools.cycle(batches) for name in ("update", "sweep", "plain")}
    step = of_updates.step + 1
    step_size, inverse_root = LR / (1 - BETAS[0] ** step), (1 - BETAS[1] ** step) ** -0.5
    numbers = (1 - BETAS[0], BETAS[1], 1 - BETAS[1], step_size, inverse_root, EPS)
    scalars = tuple(np.float32(number) for number in numbers)

    def take(move: Any, table: RowState, catch_up: CatchUp, name: str) -> None:
        some = next(rows[name])
        move(table, some, gradients[: some.size], catch_up, LR)
        catch_up.advance(LR)

    def take_plain() -> None:
        some = next(rows["plain"])
        dense_sweep(plain.weight, plain.state, plain.last_step, some, gradients, np.int32(step), scalars)

    candidates: dict[str, Candidate] = {
        "update": lambda: take(update_rows, updated, of_updates, "update"),
        "sweep": lambda: take(sweep_rows, swept, of_sweeps, "sweep"),
        "plain": take_plain,
    }
    s = setting.time(candidates, max(5, setting.repeats // 3))
    chosen, other = ("sweep", "update") if is_for_sweep(len(batches[0]), num_rows, num_rows) else ("update", "sweep")
    name = f"{percent} % of rows, {chosen} is chosen"
    return [
        Comparison(name, s[chosen], f"our {other}", s[other], 0.90),
        Comparison(name, s[chosen], "a plain sweep", s["plain"], 0.90),
    ]


def whole_path(setting: Setting) -> list[Comparison]:
    """Hash, distinct rows, read, sum and update of both layers on one core; times are per token."""
    numba.set_num_threads(1)
    try:
        return [_whole_path(setting, *kind) for kind in ROW_KINDS]
    finally:
        numba.set_num_threads(setting.num_threads)


def _whole_path(setting: Setting, kind: str, dtype: np.dtype[Any]) -> Comparison:
    table, catch_up = used_table(dtype, PATH_ROWS)
    starts = itertools.cycle(range(0, len(setting.text.tokens) - PATH_WINDOWS, PATH_WINDOWS))
    lookups = PATH_WINDOWS * WINDOW * int(setting.text.hasher.row_offsets_LH.size)
    gradients = np.full((lookups, ROW_DIM), 1e-3, np.float32)
    out, pool = np.zeros((lookups, ROW_DIM), dtype), BufferPool()

    def step() -> None:
        rows, _ = unique_rows(setting.text.rows(lookups, PATH_ROWS, skip=next(starts)))
        read_rows(table, rows, out[: rows.size], catch_up)
        summed = sum_pieces(rows, [gradients[: rows.size]], pool.empty)
        update_rows(table, summed.rows, summed.sums, catch_up, LR)
        catch_up.advance(LR)

    seconds = setting.time({"step": step}, max(3, setting.repeats // 4))["step"]
    per_token = seconds / (PATH_WINDOWS * WINDOW)
    return Comparison(f"host path per token, {kind}, one core", per_token, "100,000 tokens/s", 1e-5, 1.0)
