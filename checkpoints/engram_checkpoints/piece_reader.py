"""Reading parts of tensors from a `torch_dist` folder: of a stored piece only the rows that are asked for.

torch's own reader loads a stored piece whole, however little of it is wanted: four tensor ranks that divide what one
rank wrote would each read all of it, and a program that reads a vocabulary by rows would read it once per part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future


class _Stored(NamedTuple):
    """A piece as it stands in its file, row by row from byte `start` on."""

    start: int
    shape: Sequence[int]
    dtype: torch.dtype


class PieceReader(FileSystemReader):
    """`FileSystemReader` that reads rows (along the first dimension) of a piece where not all are wanted."""

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Called by torch, or by a reader without a planner, before `read_data`."""
        super().set_up_storage_reader(metadata, is_coordinator, *args, **kwargs)
        self._tensors = metadata.state_dict_metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Raises what a damaged file happens to break, as torch's reader does; EOFError for one that is too short."""
        whole = [item for item in plan.items if not (self._is_part(item) and self._read_rows(item, planner))]
        return super().read_data(replace(plan, items=whole), planner)

    def _is_part(self, item: ReadItem) -> bool:
        stored = self._tensors[item.storage_index.fqn]
        if not isinstance(stored, TensorStorageMetadata) or not item.lengths:
            return False
        piece = next(chunk for chunk in stored.chunks if chunk.offsets == item.storage_index.offset)
        return item.lengths[0] < piece.sizes[0]

    def _read_rows(self, item: ReadItem, planner: LoadPlanner) -> bool:
        """Read the rows of a piece that `item` names; says whether they could be read apart."""
        info = self.storage_data[item.storage_index]
        if info.transform_descriptors:  # compressed by somebody's extension
            return False
        with self.fs.create_stream(self.fs.concat_path(self.path, info.relative_path), "rb") as file:
            stored = _find(self._slice_file(file, info))
            if stored is None:
                return False
            row_bytes = prod(stored.shape[1:]) * stored.dtype.itemsize
            content = torch.empty(item.lengths[0] * row_bytes, dtype=torch.uint8)
            file.seek(info.offset + stored.start + item.storage_offsets[0] * row_bytes)
            if file.readinto(content.numpy()) != content.numel():  # type: ignore[attr-defined]
                raise EOFError(f"{info.relative_path} ends within {item.storage_index.fqn}")
        rows = content.view(stored.dtype).view(item.lengths[0], *stored.shape[1:])
        for dimension in range(1, rows.ndim):
            rows = rows.narrow(dimension, item.storage_offsets[dimension], item.lengths[dimension])
        target = planner.resolve_tensor(item).detach()
        target.copy_(rows)
        planner.commit_tensor(item, target)
        return True


def _find(piece: Any) -> _Stored | None:
    """Where the numbers of a piece lie in its part of the file; None where they do not lie row by row."""
    with FakeTensorMode():  # reads what is said of the tensor, not its numbers
        tensor = torch.load(piece, map_location="cpu", weights_only=True)
    if not tensor.is_contiguous():
        return None
    start: int = tensor.untyped_storage()._checkpoint_offset
    return _Stored(start + tensor.storage_offset() * tensor.element_size(), tensor.shape, tensor.dtype)
