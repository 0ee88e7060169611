"""The backbone of a checkpoint (see `backbone`) without a model: whole tensors, whatever ranks wrote them."""

from __future__ import annotations

import io
import pickle
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from engram_checkpoints.tensor_source import TensorInfo
from engram_checkpoints.torch_file import StoredTensor, read_torch_file
from engram_checkpoints.verified_files import VerifiedFiles
from engram_megatron.errors import UsageError

COMMON_STATE = "common_state/shard_0_1"  # megatron-core's name for what is no tensor
_OPEN_PIECES = 4096  # places of pieces that are remembered


class BackboneReader:
    """A `TensorSource` of a `torch_dist` folder. `num_steps`: updates that the optimizer has done; `common`: all else
    that is no tensor."""

    def __init__(self, folder: Path, files: VerifiedFiles | None = None) -> None:
        """`files` are asked before a file is used. Raises `UsageError` where there is no backbone, or its index is
        damaged."""
        self.folder = folder
        self._files = VerifiedFiles(folder, None) if files is None else files
        index = folder / ".metadata"
        try:
            metadata = pickle.loads(self._files.check(index).read_bytes())
            assert isinstance(metadata, Metadata), type(metadata)
        except UsageError:
            raise
        except Exception as error:  # what the damage happens to break: pickle, end of file
            raise UsageError(f"{folder} holds no backbone checkpoint, or its .metadata is damaged ({error})") from error
        self._metadata = metadata.state_dict_metadata
        self._places: dict[MetadataIndex, _StorageInfo] = metadata.storage_data
        self._open_piece = lru_cache(maxsize=_OPEN_PIECES)(self._read_piece)
        self.tensors = {
            name: TensorInfo(tuple(stored.size), stored.properties.dtype)
            for name, stored in sorted(self._metadata.items(), key=lambda item: self._first_place(*item))
            if isinstance(stored, TensorStorageMetadata)
        }
        self.common = self._read_common()
        self.num_steps = int(self.common.get("optimizer", {}).get("num_steps", 0))

    def read(self, name: str, rows: slice = slice(None)) -> torch.Tensor:
        """As of `TensorSource`. Takes as much memory as it returns, and again where the tensor is not stored in whole
        rows."""
        stored, info = self._metadata[name], self.tensors[name]
        assert isinstance(stored, TensorStorageMetadata)
        if not info.shape:
            return self._read(name, stored.chunks[0], 0, None)
        first, stop, _ = rows.indices(info.shape[0])
        pieces = [chunk for chunk in stored.chunks if _meets(chunk, first, stop)]
        if len(pieces) == 1 and pieces[0].sizes[1:] == torch.Size(info.shape[1:]):
            offset = pieces[0].offsets[0]
            return self._read(name, pieces[0], first - offset, stop - offset)
        out = torch.empty((stop - first, *info.shape[1:]), dtype=info.dtype)
        for chunk in pieces:
            start, end = max(first, chunk.offsets[0]), min(stop, chunk.offsets[0] + chunk.sizes[0])
            values = self._read(name, chunk, start - chunk.offsets[0], end - chunk.offsets[0])
            part = out[start - first : end - first]
            for dimension in range(1, len(info.shape)):
                part = part.narrow(dimension, chunk.offsets[dimension], chunk.sizes[dimension])
            part.copy_(values)
        return out

    def num_pieces(self, name: str) -> int:
        """In how many pieces a tensor is stored."""
        stored = self._metadata[name]
        assert isinstance(stored, TensorStorageMetadata)
        return len(stored.chunks)

    def _first_place(self, name: str, stored: Any) -> tuple[str, int]:
        """Where a tensor begins: in this order files are read from beginning to end."""
        chunks = stored.chunks if isinstance(stored, TensorStorageMetadata) else []
        places = [self._places.get(MetadataIndex(name, chunk.offsets)) for chunk in chunks]
        return min(((place.relative_path, place.offset) for place in places if place is not None), default=("", 0))

    def _read(self, name: str, chunk: ChunkStorageMetadata, first: int, stop: int | None) -> torch.Tensor:
        try:
            piece = self._open_piece(MetadataIndex(name, chunk.offsets))
            if not isinstance(piece, StoredTensor) or piece.info != (tuple(chunk.sizes), self.tensors[name].dtype):
                raise ValueError(f"a piece of shape {tuple(chunk.sizes)} was expected, not {piece}")
            return piece.read(first, stop)
        except UsageError:
            raise
        except Exception as error:  # what the damage happens to break: pickle, zip, end of file
            reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
            raise UsageError(f"{self.folder}: {name} cannot be read ({reason}); use another checkpoint") from error

    def _read_piece(self, index: MetadataIndex) -> Any:
        place = self._places[index]
        return read_torch_file(self._files.check(self.folder / place.relative_path), place.offset, place.length)

    def _read_common(self) -> dict[str, Any]:
        if not isinstance(self._metadata.get(COMMON_STATE), BytesStorageMetadata):
            raise UsageError(f"{self.folder} has no {COMMON_STATE}: written by another program?")
        try:
            place = self._places[MetadataIndex(COMMON_STATE)]
            with self._files.check(self.folder / place.relative_path).open("rb") as file:
                file.seek(place.offset)
                (common,) = torch.load(io.BytesIO(file.read(place.length)), weights_only=True)
        except UsageError:
            raise
        except Exception as error:  # as above
            raise UsageError(
                f"{self.folder}: {COMMON_STATE} cannot be read ({error}); use another checkpoint"
            ) from error
        return dict(common)


def _meets(chunk: ChunkStorageMetadata, first: int, stop: int) -> bool:
    return bool(chunk.offsets[0] < stop and first < chunk.offsets[0] + chunk.sizes[0])
