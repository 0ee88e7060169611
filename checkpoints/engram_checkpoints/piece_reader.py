"""Reading parts of tensors from a `torch_dist` folder: of a stored piece only the rows that are asked for.

torch's own reader loads a stored piece whole, however little of it is wanted: four tensor ranks that divide what one
rank wrote would each read all of it, and a program that reads a vocabulary by rows would read it once per part.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from engram_checkpoints.torch_file import NotByRowsError, StoredTensor, read_torch_file


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
        try:
            stored = read_torch_file(Path(self.path) / info.relative_path, info.offset, info.length)
        except NotByRowsError:
            return False
        assert isinstance(stored, StoredTensor), item
        first = item.storage_offsets[0]
        rows = stored.read(first, first + item.lengths[0])
        for dimension in range(1, rows.ndim):
            rows = rows.narrow(dimension, item.storage_offsets[dimension], item.lengths[dimension])
        target = planner.resolve_tensor(item).detach()
        target.copy_(rows)
        planner.commit_tensor(item, target)
        return True
