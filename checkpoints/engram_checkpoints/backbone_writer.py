"""A backbone folder (see `backbone`) written by one process without a model, piece by piece."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path

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
from engram_checkpoints.tensor_source import TensorInfo, TensorSource, row_pieces

FILE_BYTES = 2 * 1024**3  # a file is closed when it has this many
PIECE_BYTES = 64 * 1024**2  # of a tensor in memory at a time


class BackboneWriter:
    """Adds tensors one after another; `close` makes the folder readable. `sums` takes those of the files."""

    def __init__(self, folder: Path, sums: FileSums) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self._sums = folder, sums
        self._tensors: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        self._places: dict[MetadataIndex, _StorageInfo] = {}
        self._file: io.BufferedWriter | None = None
        self._num_files = 0

    def add(self, name: str, source: TensorSource, source_name: str | None = None) -> None:
        """Copy a tensor of `source`, which has it as `source_name`."""
        source_name = name if source_name is None else source_name
        info = source.tensors[source_name]
        for rows in row_pieces(info, PIECE_BYTES):
            self.add_rows(name, info, rows, source.read(source_name, rows))

    def add_rows(self, name: str, info: TensorInfo, rows: slice, values: torch.Tensor) -> None:
        """`rows` of the whole tensor that `info` describes; all pieces of a tensor must be added."""
        assert values.dtype == info.dtype, (name, values.dtype, info.dtype)
        shape = torch.Size(info.shape)
        stored = self._tensors.setdefault(name, TensorStorageMetadata(TensorProperties(info.dtype), shape, []))
        assert isinstance(stored, TensorStorageMetadata)
        offsets = torch.Size([rows.indices(shape[0])[0] if i == 0 else 0 for i in range(len(shape))])
        stored.chunks.append(ChunkStorageMetadata(offsets, values.shape))
        content = values.detach().contiguous()
        if content.untyped_storage().nbytes() != content.numel() * content.element_size():
            content = content.clone()  # torch.save would write the whole storage
        self._write(MetadataIndex(name, offsets), content)

    def close(self, num_steps: int) -> None:
        """Write the index. `num_steps`: updates that the optimizer has done."""
        self._tensors[COMMON_STATE] = BytesStorageMetadata()
        self._write(MetadataIndex(COMMON_STATE), [{"optimizer": {"num_steps": num_steps}}])
        self._close_file()
        metadata = Metadata(self._tensors, storage_data=self._places, version=CURRENT_DCP_VERSION)
        with io.BufferedWriter(SummedFile(self.folder / ".metadata", self._sums)) as file:
            pickle.dump(metadata, file)
        with io.BufferedWriter(SummedFile(self.folder / "metadata.json", self._sums)) as file:
            file.write(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}).encode())

    def _write(self, index: MetadataIndex, content: object) -> None:
        if self._file is not None and self._file.tell() >= FILE_BYTES:
            self._close_file()
        name = f"__0_{self._num_files}.distcp"
        if self._file is None:
            self._file = io.BufferedWriter(SummedFile(self.folder / name, self._sums))
        start = self._file.tell()
        torch.save(content, self._file)
        self._places[index] = _StorageInfo(name, start, self._file.tell() - start)

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
            self._num_files += 1
