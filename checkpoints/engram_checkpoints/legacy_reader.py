"""Reading Megatron's per-rank files (`legacy_writer` says what stands in them) as whole tensors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from engram_checkpoints.checkpoint_files import is_complete, read_manifest
from engram_checkpoints.checkpoint_source import CheckpointSource
from engram_checkpoints.legacy_layout import LocalTensor, Part, legacy_ranks, local_tensors, stored_shapes
from engram_checkpoints.table_format import LAST_STEP, LEARNING_RATES, WEIGHT, TableDescription
from engram_checkpoints.tensor_source import TensorInfo
from engram_checkpoints.torch_dist_format import read_our_state
from engram_checkpoints.torch_file import StoredTensor, read_torch_file
from engram_checkpoints.verified_files import VerifiedFiles
from engram_kernels.row_state import RowState, empty_rows
from engram_megatron.config import RunConfig
from engram_megatron.errors import UsageError
from engram_megatron.overrides import from_dict
from engram_megatron.tables.row_layout import RowLayout

RANK_FILE = "model_optim_rng.pt"


def model_key(chunk: int, config: RunConfig) -> str:
    """Of a chunk's weights, as Megatron-LM has it."""
    return "model" if config.parallel.virtual_pipeline == 1 else f"model{chunk}"


def state_key(tensor: LocalTensor) -> str:
    """Of a parameter's optimizer state, as `BackboneOptimizer.state_dict` has it."""
    return f"chunk{tensor.chunk}.module.{tensor.name}"


def stored_name(part: Part, state: str | None) -> str:
    """Of a state (None: of the weight itself) of the parameter that `part` is of."""
    return part.name if state is None else f"optimizer.{state}.{part.name}"


def table_file(rank: int, array: str) -> str:
    """Below the `iter_...` folder."""
    return f"tables/rank_{rank:05d}_{array}.pt"


def table_layout(description: TableDescription, config: RunConfig) -> RowLayout:
    """How the rows are dealt over the ranks that have a file."""
    return RowLayout(description.total_rows, config.tables.block_rows, len(legacy_ranks(config)))


def open_legacy(folder: Path) -> CheckpointSource:
    """The checkpoint in the `iter_...` folder. Raises `UsageError` where it is damaged, lacks a file or a tensor, or is
    another program's."""
    files = VerifiedFiles(folder, read_manifest(folder) if is_complete(folder) else None)
    first = _read(files, next(iter(sorted(folder.glob(f"mp_rank_*/{RANK_FILE}")))))
    state, description = read_our_state(folder, first)
    config: RunConfig = from_dict(RunConfig, state.config)
    tables = None if description is None else LegacyTables(files, description, table_layout(description, config))
    num_steps = int(first["optimizer"]["num_steps"])
    return CheckpointSource(
        path=folder,
        format="legacy",
        state=state,
        backbone=LegacyBackbone(files, config),
        num_steps=num_steps,
        tables=tables,
    )


class LegacyBackbone:
    """A `TensorSource` of the ranks' files."""

    def __init__(self, files: VerifiedFiles, config: RunConfig) -> None:
        self._places: dict[str, dict[tuple[Any, ...], tuple[Part, StoredTensor]]] = {}
        for rank in legacy_ranks(config):
            path = files.folder / rank.folder(config) / RANK_FILE
            content = _read(files, path)
            for tensor in local_tensors(config, rank):
                for state, stored in _with_state(content, tensor, config):
                    self._add(path, tensor, state, stored)
        shapes = stored_shapes(config)
        self.tensors = {
            name: TensorInfo(shapes[part.name], stored.info.dtype)
            for name, places in sorted(self._places.items())
            for part, stored in list(places.values())[:1]
        }

    def read(self, name: str, rows: slice = slice(None)) -> torch.Tensor:
        info = self.tensors[name]
        first, stop, _ = rows.indices(info.shape[0])
        out = torch.empty((stop - first, *info.shape[1:]), dtype=info.dtype)
        for part, stored in self._places[name].values():
            start, end = max(first, part.first_row), min(stop, part.first_row + part.num_rows)
            if start < end:
                offset = part.local_row - part.first_row
                values = _values(stored, start + offset, end + offset)
                target = out[start - first : end - first]
                if part.columns is not None:
                    target = target[:, part.columns[0] : part.columns[1]]
                target.copy_(values)
        return out

    def _add(self, path: Path, tensor: LocalTensor, state: str | None, stored: StoredTensor | None) -> None:
        """What several ranks hold is taken from the first of them."""
        if not isinstance(stored, StoredTensor) or stored.info.shape != tensor.shape:
            found = "none" if stored is None else f"one of shape {stored.info.shape}"
            raise UsageError(f"{path} should hold {tensor.name} of shape {tensor.shape}, and holds {found}")
        for part in tensor.parts:
            places = self._places.setdefault(stored_name(part, state), {})
            places.setdefault((part.first_row, part.columns), (part, stored))


class LegacyTables:
    """A `TableSource` of the ranks' rows."""

    def __init__(self, files: VerifiedFiles, description: TableDescription, layout: RowLayout) -> None:
        self.description, self._files, self._layout = description, files, layout
        self._arrays: dict[str, StoredTensor] = {}

    def rows(self, start: int, stop: int) -> RowState:
        description = self.description
        rows = empty_rows(stop - start, description.row_dim, description.dtype, description.num_moments)
        moments = dict(zip(description.moments, np.hsplit(rows.state, rows.moments), strict=True))
        for name, out in {WEIGHT: rows.weight, **moments, LAST_STEP: rows.last_step}.items():
            self._read_rows(name, start, stop, out)
        return rows

    def last_step(self, start: int, stop: int) -> NDArray[np.int32]:
        out = np.empty(stop - start, np.int32)
        self._read_rows(LAST_STEP, start, stop, out)
        return out

    def learning_rates(self) -> NDArray[np.float64]:
        stored = self._array(f"tables/{LEARNING_RATES}.pt")
        return np.asarray(_values(stored, 0, self.description.step_count).numpy())

    def _read_rows(self, name: str, start: int, stop: int, out: NDArray[Any]) -> None:
        layout = self._layout
        for first, end in layout_pieces(layout, start, stop):
            rank, local = (int(of(np.array(first))) for of in (layout.owner, layout.local_index))
            stored = self._array(table_file(rank, name))
            out[first - start : end - start] = _values(stored, local, local + end - first).numpy()

    def _array(self, name: str) -> StoredTensor:
        if name not in self._arrays:
            stored = _read(self._files, self._files.folder / name)
            assert isinstance(stored, StoredTensor), name
            self._arrays[name] = stored
        return self._arrays[name]


def layout_pieces(layout: RowLayout, start: int, stop: int) -> list[tuple[int, int]]:
    """Rows start .. stop - 1, cut where blocks end."""
    size = layout.block_rows
    return [(max(b, start), min(b + size, stop)) for b in range(start // size * size, stop, size)]


def _with_state(
    content: dict[str, Any], tensor: LocalTensor, config: RunConfig
) -> Iterator[tuple[str | None, StoredTensor | None]]:
    """A local tensor, under None, and its optimizer state by name."""
    yield None, content[model_key(tensor.chunk, config)].get(tensor.name)
    if not tensor.is_buffer:
        yield from content["optimizer"]["state"].get(state_key(tensor), {}).items()


def _values(stored: StoredTensor, first: int, stop: int) -> torch.Tensor:
    try:
        return stored.read(first, stop)
    except (OSError, EOFError) as error:
        raise UsageError(f"{stored.file} cannot be read ({error}); use another checkpoint") from error


def _read(files: VerifiedFiles, path: Path) -> Any:
    try:
        return read_torch_file(files.check(path))
    except FileNotFoundError as error:
        raise UsageError(f"{path} is missing; use another checkpoint") from error
    except UsageError:
        raise
    except Exception as error:  # what the damage happens to break: pickle, zip, end of file
        raise UsageError(f"{path} cannot be read ({error}); use another checkpoint") from error
