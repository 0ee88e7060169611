"""Files of `torch.save` without their tensors in memory: read by rows, written piece by piece.

Such a file is a zip archive whose members are not compressed: a pickle that refers to storages by number, and one
member per storage. So a tensor's bytes stand in one place of the file, and any rows of it can be read alone.
"""

from __future__ import annotations

import io
import os
import pickle
import struct
import sys
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch

from engram_checkpoints.tensor_source import TensorInfo

_ROOT = "archive"
_ALIGNMENT = 64  # of storages, as torch has them, for those who map the file
_LOCAL_HEADER_BYTES = 30
_STORAGES = {
    "BFloat16Storage": torch.bfloat16,
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "ShortStorage": torch.int16,
}
_STORAGE_OF = {dtype: name for name, dtype in _STORAGES.items()}


class NotByRowsError(pickle.UnpicklingError):
    """A tensor was saved as a view in which rows do not lie one after another."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that lies in `file` from byte `offset` on, row after row."""

    file: Path
    info: TensorInfo
    offset: int

    def read(self, first: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows first .. stop - 1; all of a tensor without rows. Raises `EOFError` where the file is too short."""
        shape = list(self.info.shape)
        start = self.offset
        if shape:
            start += first * prod(shape[1:]) * self.info.dtype.itemsize
            shape[0] = (shape[0] if stop is None else stop) - first
        out = torch.empty(shape, dtype=self.info.dtype)
        _read_into(self.file, start, memoryview(out.view(-1).view(torch.uint8).numpy()) if out.numel() else b"")
        return out


def read_torch_file(file: Path, offset: int = 0, length: int | None = None) -> Any:
    """What was saved, with a `StoredTensor` in the place of each tensor. The file is `length` bytes from `offset` on of
    `file`.

    Raises what the damage happens to break (`OSError`, `pickle.UnpicklingError`, `zipfile.BadZipFile`, ...).
    """
    with file.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size - offset if length is None else length
        with zipfile.ZipFile(io.BufferedReader(_Window(stream, offset, size))) as archive:
            members = {info.filename.partition("/")[2]: info for info in archive.infolist()}
            if archive.read(members["byteorder"]) != sys.byteorder.encode():
                raise ValueError("written on a machine of another byte order")
            places = {name: _place(stream, offset, info) for name, info in members.items()}
            return _Unpickler(io.BytesIO(archive.read(members["data.pkl"])), file, places).load()


def _place(stream: Any, offset: int, info: zipfile.ZipInfo) -> int:
    """Where the bytes of a member begin."""
    if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{info.filename} is compressed")
    start = offset + info.header_offset
    stream.seek(start)
    name_length, extra_length = struct.unpack("<26xHH", stream.read(_LOCAL_HEADER_BYTES))
    return int(start + _LOCAL_HEADER_BYTES + name_length + extra_length)


class _Window(io.RawIOBase):
    """`size` bytes of a file from `offset` on, as a file."""

    def __init__(self, stream: Any, offset: int, size: int) -> None:
        self._descriptor, self._offset, self._size = stream.fileno(), offset, size
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        wanted = max(0, min(len(buffer), self._size - self._at))
        count = os.preadv(self._descriptor, [memoryview(buffer)[:wanted]], self._offset + self._at)
        self._at += count
        return count


class _Unpickler(pickle.Unpickler):
    """Knows tensors and plain values, and runs nothing else."""

    def __init__(self, content: io.BytesIO, file: Path, places: dict[str, int]) -> None:
        super().__init__(content)
        self._file, self._places = file, places

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return self._tensor
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        raise pickle.UnpicklingError(f"holds a {module}.{name}, which is no tensor and no plain value")

    def persistent_load(self, reference: Any) -> Any:
        _, dtype, key, _, _ = reference
        return dtype, self._places[f"data/{key}"]

    def _tensor(self, storage: Any, first: int, shape: Any, stride: Any, *_: Any) -> StoredTensor:
        dtype, place = storage
        whole = _strides(shape)
        if any(size > 1 and step != wanted for size, step, wanted in zip(shape, stride, whole, strict=True)):
            raise NotByRowsError("holds a tensor whose rows do not lie one after another")
        return StoredTensor(self._file, TensorInfo(tuple(shape), dtype), place + first * dtype.itemsize)


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of a tensor whose elements lie one after another."""
    return tuple(prod(shape[dimension + 1 :]) for dimension in range(len(shape)))


def _read_into(file: Path, start: int, buffer: Any) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        done = 0
        while done < len(buffer):
            count = os.preadv(descriptor, [buffer[done:]], start + done)
            if count == 0:
                raise EOFError(f"{file} ends after {start + done} bytes")
            done += count
    finally:
        os.close(descriptor)


@dataclass(frozen=True, eq=False)
class PlannedTensor:
    """A tensor whose values come later."""

    info: TensorInfo


class TorchFileWriter:
    """Writes a file that `torch.load(weights_only=True)` reads: `content`, plain values, in which a `PlannedTensor`
    stands for each tensor. `write` then takes the values of `tensors`, one after another, in pieces of any size.

    A context: the file is whole when it ends, and all values must have been written. After an error it is left as it
    is."""

    def __init__(self, stream: Any, content: Any) -> None:
        self._stream = _CountedStream(stream)
        self._archive = zipfile.ZipFile(self._stream, "w")  # type: ignore[call-overload]
        pickled = io.BytesIO()
        pickler = _Pickler(pickled)
        pickler.dump(content)
        self.tensors = pickler.tensors
        self._small("data.pkl", pickled.getvalue())
        self._small("byteorder", sys.byteorder.encode())
        self._number, self._missing = -1, 0
        self._member: Any = None
        self._next()

    def write(self, values: torch.Tensor) -> None:
        """The next values, of the dtype of their tensor; they belong to one tensor."""
        if not values.numel():
            return
        assert values.dtype == self.tensors[self._number].info.dtype, (values.dtype, self._number)
        content = values.detach().contiguous().view(-1).view(torch.uint8).numpy()
        assert 0 < content.size <= self._missing, (content.size, self._missing)
        self._member.write(np.asarray(content).data)
        self._missing -= content.size
        if not self._missing:
            self._next()

    def __enter__(self) -> TorchFileWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            assert self._number == len(self.tensors), f"{self._number} of {len(self.tensors)} tensors were written"
            self._small("version", b"3\n")
        else:
            self._stream.is_broken = True
            if self._member is not None:
                self._member.close()
        self._archive.close()

    def _small(self, name: str, content: bytes) -> None:
        self._archive.writestr(zipfile.ZipInfo(f"{_ROOT}/{name}"), content)

    def _next(self) -> None:
        """Begin the member of the next tensor that has values."""
        if self._member is not None:
            self._member.close()
        self._member = None
        while not self._missing and self._number < len(self.tensors):
            self._number += 1
            if self._number < len(self.tensors):
                self._missing = self.tensors[self._number].info.num_bytes
                self._member = self._archive.open(self._member_info(), "w", force_zip64=True)
                if not self._missing:
                    self._member.close()

    def _member_info(self) -> zipfile.ZipInfo:
        info = zipfile.ZipInfo(f"{_ROOT}/data/{self._number}")
        zip64_bytes, padding_header_bytes = 20, 4
        start = self._stream.written + _LOCAL_HEADER_BYTES + len(info.filename) + zip64_bytes + padding_header_bytes
        padding = -start % _ALIGNMENT
        info.extra = b"FB" + struct.pack("<H", padding) + bytes(padding)
        return info


class _Pickler(pickle.Pickler):
    """As `torch.save` has it: protocol 2, storages by reference."""

    def __init__(self, out: io.BytesIO) -> None:
        super().__init__(out, protocol=2)
        self.tensors: list[PlannedTensor] = []

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, PlannedTensor):
            return NotImplemented
        shape, dtype = value.info
        self.tensors.append(value)
        storage = _Storage(dtype, str(len(self.tensors) - 1), prod(shape))
        return torch._utils._rebuild_tensor_v2, (storage, 0, shape, _strides(shape), False, OrderedDict())

    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, _Storage):
            return None
        return "storage", getattr(torch, _STORAGE_OF[value.dtype]), value.key, "cpu", value.num_elements


@dataclass(frozen=True)
class _Storage:
    dtype: torch.dtype
    key: str
    num_elements: int


class _CountedStream:
    """Counts what is written and cannot go back, so that the archive is written from beginning to end."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.written = 0
        self.is_broken = False  # nothing more is written

    def write(self, content: Any) -> int:
        if not self.is_broken:
            self._stream.write(content)
        count = len(content)
        self.written += count
        return count

    def flush(self) -> None:
        """The file's own buffer is flushed when it is closed."""
