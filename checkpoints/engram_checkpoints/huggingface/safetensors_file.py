"""safetensors files: written from beginning to end with one piece of a tensor in memory, read by rows.

The library writes tensors that are in memory; a table can be larger than that. The format has no need of it: 8 bytes
with the length of the header, the header (JSON: dtype, shape and place of each tensor), then the tensors' bytes.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engram_checkpoints.tensor_source import TensorInfo
from engram_megatron.errors import UsageError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64", torch.int64: "I64"}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}


@dataclass(frozen=True)
class Entry:
    """A tensor to write. `pieces` gives its rows in order."""

    name: str
    info: TensorInfo
    pieces: Callable[[], Iterable[Tensor]]


def write_folder(folder: Path, entries: Sequence[Entry], shard_bytes: int, on_file: Callable[[str], None]) -> None:
    """Write files of at most `shard_bytes` (a tensor is never divided, so one that is larger has a file of its own) and
    the index over them. `on_file` is called with the name of each file when it is written."""
    shards = _shards(entries, shard_bytes)
    where: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write(folder / name, shard)
        where |= {entry.name: name for entry in shard}
        on_file(name)
    total = sum(entry.info.num_bytes for entry in entries)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _shards(entries: Sequence[Entry], shard_bytes: int) -> list[list[Entry]]:
    shards: list[list[Entry]] = [[]]
    room = shard_bytes
    for entry in entries:
        if shards[-1] and entry.info.num_bytes > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(entry)
        room -= entry.info.num_bytes
    return shards


def _write(path: Path, entries: Sequence[Entry]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    ends = [0]
    for entry in entries:
        ends.append(ends[-1] + entry.info.num_bytes)
    for entry, (start, stop) in zip(entries, pairwise(ends), strict=True):
        header[entry.name] = {
            "dtype": _NAMES[entry.info.dtype],
            "shape": list(entry.info.shape),
            "data_offsets": [start, stop],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for entry in entries:
            before = file.tell()
            for piece in entry.pieces():
                assert piece.dtype == entry.info.dtype, (entry.name, piece.dtype)
                file.write(piece.contiguous().view(-1).view(torch.uint8).numpy().data)
            assert file.tell() - before == entry.info.num_bytes, entry.name


class SafetensorsFolder:
    """A `TensorSource` of a folder's safetensors files.

    A file is open only while a piece of it is read: what the library has mapped counts as this process's memory.
    """

    def __init__(self, folder: Path) -> None:
        """Raises `UsageError` where the folder has none, or one of them is missing, damaged or of a dtype that this
        program does not read."""
        self.folder = folder
        self._files = self._find()
        self.tensors: dict[str, TensorInfo] = {}
        for file in sorted(set(self._files.values())):
            self.tensors |= dict(self._infos(file))
        missing = sorted(self._files.keys() - self.tensors.keys())
        if missing:
            raise UsageError(
                f"{folder / INDEX} says that {missing[0]} is in {self._files[missing[0]]}, where it is not"
            )

    def _find(self) -> dict[str, str]:
        """File of each tensor, by the index, or by the only file."""
        if not self.folder.is_dir():
            raise UsageError(f"{self.folder} is not a folder; give one with a config.json and .safetensors files")
        if (self.folder / INDEX).is_file():
            try:
                return dict(json.loads((self.folder / INDEX).read_text())["weight_map"])
            except (ValueError, KeyError, TypeError) as error:
                raise UsageError(f"{self.folder / INDEX} is damaged ({error}); download it again") from error
        if not (self.folder / SINGLE).is_file():
            raise UsageError(f"{self.folder} has neither {INDEX} nor {SINGLE}; give a folder with safetensors weights")
        return {name: SINGLE for name, _ in self._infos(SINGLE)}

    def _infos(self, file: str) -> Iterator[tuple[str, TensorInfo]]:
        with self._opened(file) as opened:
            for name in opened.keys():  # noqa: SIM118 (not a dictionary)
                part = opened.get_slice(name)
                dtype = part.get_dtype()
                if dtype not in _DTYPES:
                    raise UsageError(
                        f"{self.folder / file}: {name} is of type {dtype}, which is not read here; convert the weights "
                        "to bfloat16 first"
                    )
                yield name, TensorInfo(tuple(part.get_shape()), _DTYPES[dtype])

    def read(self, name: str, rows: slice = slice(None)) -> Tensor:
        """As of `TensorSource`."""
        with self._opened(self._files[name]) as opened:
            part = opened.get_slice(name)
            whole = part[rows] if self.tensors[name].shape else opened.get_tensor(name)
            return torch.as_tensor(whole).clone()

    def _opened(self, file: str) -> Any:
        from safetensors import SafetensorError, safe_open

        try:
            return safe_open(self.folder / file, framework="pt")
        except FileNotFoundError as error:
            raise UsageError(f"{self.folder / file} is missing; download it again") from error
        except (SafetensorError, OSError) as error:
            raise UsageError(f"{self.folder / file} is damaged ({error}); download it again") from error
