"""A backbone folder (see `backbone`) written by one process without a model, piece by piece."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from engram_checkpoints.backbone_reader import COMMON_STATE
from engram_checkpoints.checkpoint_files import FileSums, SummedFile
from engram_checkpoints.read_ahead import read_ahead
from engram_checkpoints.tensor_source import TensorInfo, TensorSource, row_pieces
from engram_checkpoints.torch_file import PlannedTensor, TorchFileWriter

FILE_BYTES = 512 * 1024**2  # a file is closed when it has this many
PIECE_BYTES = 64 * 1024**2  # of a tensor in memory at a time
_UNIT = "pieces in file "


class BackboneWriter:
    """Adds tensors one after another; `close` makes the folder readable. `sums` takes those of the files, and says
    which pieces an earlier try has written."""

    def __init__(
        self,
        folder: Path,
        sums: FileSums,
        piece_bytes: int | None = None,
        on_bytes: Callable[[int], None] = lambda _bytes: None,
    ) -> None:
        """`piece_bytes` of a tensor are in memory at a time, `PIECE_BYTES` unless told otherwise; `on_bytes` is told of
        every piece."""
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self._sums, self._on_bytes = folder, sums, on_bytes
        self.piece_bytes = PIECE_BYTES if piece_bytes is None else piece_bytes
        self._tensors: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        self._places: dict[MetadataIndex, _StorageInfo] = {}
        self._file: io.BufferedWriter | None = None
        self._pieces: list[Any] = []  # of the open file
        finished = sums.notes(_UNIT)
        self._num_files = 1 + max((_number(unit) for unit in finished), default=-1)
        for pieces in finished.values():
            for name, offsets, *place in pieces:
                self._places[MetadataIndex(name, torch.Size(offsets))] = _StorageInfo(*place)

    def add(self, name: str, source: TensorSource, source_name: str | None = None) -> None:
        """Copy a tensor of `source`, which has it as `source_name`."""
        source_name = name if source_name is None else source_name
        info = source.tensors[source_name]
        for rows in row_pieces(info, self.piece_bytes):
            there = self.has(name, info, rows)
            self.add_rows(name, info, rows, absent(info, rows) if there else source.read(source_name, rows))

    def add_all(self, source: TensorSource) -> None:
        """Copy all tensors of `source` under their names; one piece is read while the one before is written."""
        pieces = [
            (name, info, rows) for name, info in source.tensors.items() for rows in row_pieces(info, self.piece_bytes)
        ]

        def read(name: str, info: TensorInfo, rows: slice) -> torch.Tensor:
            return absent(info, rows) if self.has(name, info, rows) else source.read(name, rows)

        values = read_ahead(partial(read, *piece) for piece in pieces)
        for (name, info, rows), of_piece in zip(pieces, values, strict=True):
            self.add_rows(name, info, rows, of_piece)

    def has(self, name: str, info: TensorInfo, rows: slice) -> bool:
        """Whether an earlier try has written this piece: `add_rows` then looks at the shape of its values alone."""
        return MetadataIndex(name, _offsets(info, rows)) in self._places

    def add_rows(self, name: str, info: TensorInfo, rows: slice, values: torch.Tensor) -> None:
        """`rows` of the whole tensor that `info` describes; all pieces of a tensor must be added, once each."""
        assert values.dtype == info.dtype, (name, values.dtype, info.dtype)
        content = values.detach().contiguous()
        offsets = _offsets(info, rows)
        index = MetadataIndex(name, offsets)
        if index not in self._places:
            place = self._write(index, content)
            self._pieces.append([name, list(offsets), place.relative_path, place.offset, place.length])
        properties = TensorProperties(info.dtype)
        stored = self._tensors.setdefault(name, TensorStorageMetadata(properties, torch.Size(info.shape), []))
        assert isinstance(stored, TensorStorageMetadata)
        stored.chunks.append(ChunkStorageMetadata(offsets, content.shape))
        self._on_bytes(content.nbytes)

    def close(self, num_steps: int, common: dict[str, Any] | None = None) -> None:
        """Write the index. `num_steps`: updates that the optimizer has done; `common`: what else is no tensor."""
        self._tensors[COMMON_STATE] = BytesStorageMetadata()
        self._write(MetadataIndex(COMMON_STATE), [{**(common or {}), "optimizer": {"num_steps": num_steps}}])
        self._close_file()
        metadata = Metadata(self._tensors, storage_data=self._places, version=CURRENT_DCP_VERSION)
        with io.BufferedWriter(SummedFile(self.folder / ".metadata", self._sums)) as file:
            pickle.dump(metadata, file)
        with io.BufferedWriter(SummedFile(self.folder / "metadata.json", self._sums)) as file:
            file.write(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}).encode())

    def _write(self, index: MetadataIndex, content: object) -> _StorageInfo:
        if self._file is not None and self._file.tell() >= FILE_BYTES:
            self._close_file()
        name = f"__0_{self._num_files}.distcp"
        if self._file is None:
            self._file = io.BufferedWriter(SummedFile(self.folder / name, self._sums))
        start = self._file.tell()
        if isinstance(content, torch.Tensor):
            # torch.save makes another error of one that the disk raises.
            with TorchFileWriter(self._file, PlannedTensor(TensorInfo(tuple(content.shape), content.dtype))) as writer:
                writer.write(content)
        else:
            buffer = io.BytesIO()
            torch.save(content, buffer)
            self._file.write(buffer.getvalue())
        self._places[index] = place = _StorageInfo(name, start, self._file.tell() - start)
        return place

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()
            self._sums.commit(f"{_UNIT}{self._num_files}", self._pieces)
            self._file, self._pieces = None, []
            self._num_files += 1


def _number(unit: str) -> int:
    return int(unit.removeprefix(_UNIT))


def _offsets(info: TensorInfo, rows: slice) -> torch.Size:
    return torch.Size([rows.indices(size)[0] if i == 0 else 0 for i, size in enumerate(info.shape)])


def absent(info: TensorInfo, rows: slice) -> torch.Tensor:
    """In the place of values that are not needed."""
    shape = [len(range(*rows.indices(size))) if i == 0 else size for i, size in enumerate(info.shape)]
    return torch.empty(shape, dtype=info.dtype, device="meta")
