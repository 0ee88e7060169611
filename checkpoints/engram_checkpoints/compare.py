"""Two checkpoints, logical tensor by logical tensor, whatever their formats, layouts and blocks."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from engram_checkpoints.checkpoint_source import CheckpointSource, TableSource, row_bytes
from engram_checkpoints.table_format import LAST_STEP, WEIGHT
from engram_checkpoints.tensor_source import TensorInfo, row_pieces
from engram_checkpoints.tensor_tables import row_tensors, tensor_name
from engram_kernels.catch_up import CatchUp
from engram_kernels.row_adam import read_rows
from engram_kernels.row_state import RowState

PIECE_BYTES = 16 * 1024**2  # of each of the two in memory at a time
# What says where and how a run ran, not what was learned.
_FREE_STATE = ("config", "world_size", "format")


@dataclass(frozen=True)
class Difference:
    """Of one tensor or value. `relative`: the largest difference, as a multiple of the largest value; None where there
    is no number to compare."""

    name: str
    text: str
    relative: float | None = None


class _Distance:
    """Between two tensors that come in pieces."""

    def __init__(self) -> None:
        self.different = 0
        self._difference = self._largest = 0.0
        self._not_finite = 0

    def add(self, a: torch.Tensor, b: torch.Tensor) -> None:
        if torch.equal(_bits(a), _bits(b)):
            return
        self.different += int((_bits(a) != _bits(b)).view(a.numel(), -1).any(1).sum())
        wide_a, wide_b = a.double(), b.double()
        finite = wide_a.isfinite() & wide_b.isfinite()
        self._not_finite += int((~finite & ~((wide_a == wide_b) | (wide_a.isnan() & wide_b.isnan()))).sum())
        wide_a, wide_b = wide_a[finite], wide_b[finite]
        if wide_a.numel():
            self._difference = max(self._difference, float((wide_a - wide_b).abs().max()))
            self._largest = max(self._largest, float(wide_a.abs().max()), float(wide_b.abs().max()))

    def difference(self, name: str, num_elements: int) -> Difference | None:
        """None where they are equal to the bit."""
        if not self.different:
            return None
        relative = self._difference / self._largest if self._largest else 0.0
        text = f"{self.different:,} of {num_elements:,} elements differ, by at most {self._difference:.3g}"
        if self._not_finite:
            return Difference(name, f"{text}; {self._not_finite:,} are NaN or infinite on one side")
        return Difference(name, f"{text} ({relative:.3g} of the largest)", relative)


def differences(
    a: CheckpointSource, b: CheckpointSource, on_bytes: Callable[[int], None] = lambda _bytes: None
) -> Iterator[Difference]:
    """All differences of what was learned: tensors, tables, and the state of training but its config."""
    yield from state_differences(a, b, config=False)
    ours, theirs = a.backbone.tensors, b.backbone.tensors
    for name in sorted(ours.keys() | theirs.keys()):
        if name not in ours or name not in theirs:
            yield Difference(name, f"only in {(a if name in ours else b).path}")
        elif ours[name] != theirs[name]:
            yield Difference(name, f"{_text(ours[name])} and {_text(theirs[name])}")
        else:
            distance = _Distance()
            for rows in row_pieces(ours[name], PIECE_BYTES):
                values = a.backbone.read(name, rows)
                distance.add(values, b.backbone.read(name, rows))
                on_bytes(values.nbytes)
            found = distance.difference(name, torch.Size(ours[name].shape).numel())
            if found is not None:
                yield found
    if a.tables is None or b.tables is None:
        if a.tables is not b.tables:
            yield Difference("engram.tables", f"only in {(b if a.tables is None else a).path}")
    else:
        yield from _table_differences(a.tables, b.tables, on_bytes)


def state_differences(a: CheckpointSource, b: CheckpointSource, *, config: bool) -> Iterator[Difference]:
    """Of `train_state.json` and the optimizer's count of updates; `config`: of the part that is free to differ."""
    ours, theirs = ({**asdict(source.state), "num_steps": source.num_steps} for source in (a, b))
    flat = [
        {key: v for key, v in _leaves(state) if (key.split(".")[0] in _FREE_STATE) == config}
        for state in (ours, theirs)
    ]
    for key in sorted(flat[0].keys() | flat[1].keys()):
        values = [json.dumps(of.get(key)) for of in flat]
        if values[0] != values[1]:
            yield Difference(key, " and ".join(value if len(value) < 60 else f"{value[:57]}..." for value in values))


def _table_differences(a: TableSource, b: TableSource, on_bytes: Callable[[int], None]) -> Iterator[Difference]:
    ours, theirs = (dict(asdict(t.description), block_rows=None, base=None) for t in (a, b))
    unlike = [key for key in ours if ours[key] != theirs[key]]
    yield from (Difference(f"engram.tables {key}", f"{ours[key]} and {theirs[key]}") for key in unlike)
    if {"total_rows", "row_dim", "dtype", "update", "step_count"} & set(unlike):
        return
    rates = a.learning_rates(), b.learning_rates()
    if not np.array_equal(*rates):
        yield Difference("engram.tables learning_rates", "differ")
    yield from _row_differences(a, b, on_bytes)


def _row_differences(a: TableSource, b: TableSource, on_bytes: Callable[[int], None]) -> Iterator[Difference]:
    """Rows that stand as of the same step on both sides are compared as they stand, and all as of the last step: a row
    may stand as of a later step than its last gradient's, by rules that depend on the layout."""
    description = a.description
    stored = {name: _Distance() for name in row_tensors(description, a.rows(0, 0))}
    last_steps = stored.pop(tensor_name(LAST_STEP))
    finished, catch_ups = _Distance(), [_catch_up(table) for table in (a, b)]
    step = max(1, PIECE_BYTES // row_bytes(description))
    for start in range(0, description.total_rows, step):
        ours, theirs = (table.rows(start, min(start + step, description.total_rows)) for table in (a, b))
        last_steps.add(torch.from_numpy(ours.last_step), torch.from_numpy(theirs.last_step))
        same = np.flatnonzero(ours.last_step == theirs.last_step)
        pair = [row_tensors(description, rows.exact(same)) for rows in (ours, theirs)]
        for name, distance in stored.items():
            distance.add(pair[0][name], pair[1][name])
        finished.add(*(_finished(rows, as_of) for rows, as_of in zip((ours, theirs), catch_ups, strict=True)))
        on_bytes(ours.num_rows * row_bytes(description))
    elements = description.total_rows * description.row_dim
    found = [distance.difference(name, elements) for name, distance in stored.items()]
    found.append(finished.difference(f"{tensor_name(WEIGHT)} as of step {description.step_count}", elements))
    if last_steps.different:
        text = f"{last_steps.different:,} of {description.total_rows:,} rows stand as of another step"
        found.append(Difference(tensor_name(LAST_STEP), text, 0.0))
    yield from (difference for difference in found if difference is not None)


def _catch_up(table: TableSource) -> CatchUp | None:
    constants = table.description.catch_up
    if constants is None:
        return None
    catch_up = CatchUp(constants["beta1"], constants["beta2"], constants["eps"])
    catch_up.replay(table.learning_rates())
    return catch_up


def _finished(rows: RowState, catch_up: CatchUp | None) -> torch.Tensor:
    """Weights as of the last step."""
    values = rows.weight
    if catch_up is not None:
        values = np.empty_like(rows.weight)
        read_rows(rows, np.arange(rows.num_rows), values, catch_up)
    return torch.from_numpy(values)


def _bits(values: torch.Tensor) -> torch.Tensor:
    return values.contiguous().view(-1).view(torch.uint8)


def _text(info: TensorInfo) -> str:
    return f"{str(info.dtype).removeprefix('torch.')} {list(info.shape)}"


def _leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, inner in value.items():
        if isinstance(inner, dict):
            yield from _leaves(inner, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", inner
