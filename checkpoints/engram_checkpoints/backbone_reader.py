"""The backbone of a checkpoint (see `backbone`) without a model: whole tensors, whatever ranks wrote them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from engram_checkpoints.piece_reader import PieceReader
from engram_checkpoints.tensor_source import TensorInfo
from engram_megatron.errors import UsageError

COMMON_STATE = "common_state/shard_0_1"  # megatron-core's name for what is no tensor


class BackboneReader:
    """A `TensorSource` of a `backbone` folder. `num_steps`: updates that the optimizer has done."""

    def __init__(self, folder: Path) -> None:
        """Raises `UsageError` where there is no backbone, or its index is damaged."""
        self.folder = folder
        self._reader = PieceReader(folder)
        try:
            metadata = self._reader.read_metadata()
        except Exception as error:  # what the damage happens to break: pickle, end of file
            raise UsageError(f"{folder} holds no backbone checkpoint, or its .metadata is damaged ({error})") from error
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)
        self._metadata = metadata.state_dict_metadata
        self.tensors = {
            name: TensorInfo(tuple(stored.size), stored.properties.dtype)
            for name, stored in sorted(self._metadata.items())
            if isinstance(stored, TensorStorageMetadata)
        }
        self.num_steps = self._num_steps()

    def read(self, name: str, rows: slice = slice(None)) -> torch.Tensor:
        """As of `TensorSource`. Of each stored piece, the rows asked for are read."""
        stored, info = self._metadata[name], self.tensors[name]
        assert isinstance(stored, TensorStorageMetadata)
        offsets, sizes = [0] * len(info.shape), list(info.shape)
        if info.shape:
            start, stop, _ = rows.indices(info.shape[0])
            offsets[0], sizes[0] = start, stop - start
        wanted = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        out = torch.empty(sizes, dtype=info.dtype)
        self._run(name, create_read_items_for_chunk_list(name, stored, [wanted]), _IntoTensor(out))
        return out

    def _num_steps(self) -> int:
        if not isinstance(self._metadata.get(COMMON_STATE), BytesStorageMetadata):
            raise UsageError(f"{self.folder} has no {COMMON_STATE}: written by another program?")
        into = _IntoBytes()
        index = MetadataIndex(COMMON_STATE)
        nothing = torch.Size([0])
        item = ReadItem(LoadItemType.BYTE_IO, index, nothing, index, nothing, nothing)
        self._run(COMMON_STATE, [item], into)
        (common,) = torch.load(into.content, weights_only=True)
        return int(common.get("optimizer", {}).get("num_steps", 0))

    def _run(self, name: str, items: list[ReadItem], planner: LoadPlanner) -> None:
        try:
            self._reader.read_data(LoadPlan(items), planner).wait()
        except Exception as error:  # what the damage happens to break: pickle, zip, end of file
            reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
            raise UsageError(f"{self.folder}: {name} cannot be read ({reason}); use another checkpoint") from error


class _Planner(LoadPlanner):
    """The part of a planner that a reader asks for when the plan is made."""

    def set_up_planner(self, *args: Any, **kwargs: Any) -> None:
        raise AssertionError("the plan is made already")

    def create_local_plan(self) -> LoadPlan:
        raise AssertionError("the plan is made already")

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        raise AssertionError("the plan is made already")

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        raise AssertionError("the plan is made already")

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise AssertionError("no bytes were asked for")

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        raise AssertionError("no tensor was asked for")

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        pass


class _IntoTensor(_Planner):
    def __init__(self, out: torch.Tensor) -> None:
        self._out = out

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        view = self._out
        for dimension, (offset, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            view = view.narrow(dimension, offset, length)
        return view


class _IntoBytes(_Planner):
    content = io.BytesIO()

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.content = value
