"""Megatron's IndexedDataset on disk, PREFIX.bin and PREFIX.idx, as megatron-core 0.19.2 writes and reads it
(`megatron/core/datasets/indexed_dataset.py`: `_IndexWriter`, `_IndexReader`, `DType`).

    PREFIX.bin   the tokens of all sequences, one after another, little-endian, of the type that the index names
    PREFIX.idx   "MMIDIDX\\0\\0" | version 1 uint64 | code of the type uint8 | sequences S uint64 | D + 1 uint64
                 | lengths int32 [S], tokens | pointers int64 [S], byte offsets | document indices int64 [D + 1]
                 (multimodal sets end with modes int8 [S])

Document d consists of the sequences indices[d] .. indices[d + 1] - 1; indices[0] is 0 and indices[D] is S.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram_data.corpus_format import partial_path
from engram_data.errors import CorpusError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")  # magic, version, type, sequences, documents + 1; 34 bytes
TYPE_OF_CODE = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    6: np.float64,
    7: np.float32,
    8: np.uint16,
}
MAX_SEQUENCE_TOKENS = 2**31 - 1  # lengths are int32
BLOCK_SEQUENCES = 2**18  # of the index that are looked at together
BLOCK_TOKENS = 2**20  # of the .bin that are read together


def token_type(vocab_size: int) -> np.dtype[Any]:
    """What Megatron stores ids below `vocab_size` as (`DType.optimal_dtype`): uint16 below 65,500 ids, else int32."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32).newbyteorder("<")


def type_code(dtype: np.dtype[Any]) -> int:
    """Megatron's code of an element type."""
    return next(code for code, known in TYPE_OF_CODE.items() if np.dtype(known) == dtype.newbyteorder("="))


def bin_file(prefix: Path) -> Path:
    """The tokens of the dataset `prefix`."""
    return prefix.with_name(prefix.name + ".bin")


def idx_file(prefix: Path) -> Path:
    """The index of the dataset `prefix`."""
    return prefix.with_name(prefix.name + ".idx")


@dataclass(frozen=True, eq=False)
class MegatronDataset:
    """A dataset whose index was checked. `lengths` int32 [S] and `indices` int64 [D + 1] are mapped, not read."""

    prefix: Path
    dtype: np.dtype[Any]
    num_tokens: int
    lengths: NDArray[np.int32]
    indices: NDArray[np.int64]

    @property
    def num_documents(self) -> int:
        """D."""
        return len(self.indices) - 1

    @classmethod
    def open(cls, prefix: Path) -> MegatronDataset:
        """Check the whole index and the size of the .bin, in bounded memory; no token is read.

        Raises `CorpusError` for a file that is missing, cannot be read, or is not as the format says.
        """
        idx = idx_file(prefix)
        for file in (idx, bin_file(prefix)):
            if not file.is_file():
                raise CorpusError(f"no {file}: a Megatron dataset is PREFIX.idx and PREFIX.bin, give PREFIX")
        try:
            num_idx_bytes, num_bin_bytes = idx.stat().st_size, bin_file(prefix).stat().st_size
            with idx.open("rb") as stream:
                header = stream.read(HEADER.size)
            dtype, num_sequences, num_indices = _read_header(idx, header, num_idx_bytes)
            mapped = np.memmap(idx, np.uint8, "r")
        except OSError as error:
            raise CorpusError(f"cannot read {prefix}: {error.strerror or error}") from None
        lengths, pointers, indices = _arrays(mapped, num_sequences, num_indices)
        num_tokens = _check_sequences(idx, lengths, pointers, dtype.itemsize)
        _check_documents(idx, indices, num_sequences)
        if num_bin_bytes != num_tokens * dtype.itemsize:
            raise CorpusError(
                f"{bin_file(prefix)} has {num_bin_bytes} bytes, the index tells of {num_tokens} tokens of "
                f"{dtype.itemsize} bytes = {num_tokens * dtype.itemsize}: it was cut, or is of another index"
            )
        return cls(prefix, dtype, num_tokens, lengths, indices)

    def documents(self) -> Iterator[NDArray[Any]]:
        """The tokens of every document, its sequences joined; views of a block, so copy what is kept.

        Memory: a block of `BLOCK_TOKENS` tokens, or the longest document.
        """
        with bin_file(self.prefix).open("rb") as stream:
            for document_lengths in self._document_lengths():
                ends = np.cumsum(document_lengths)
                start = done = 0
                while start < len(ends):
                    stop = max(start + 1, int(np.searchsorted(ends, done + BLOCK_TOKENS, side="right")))
                    block = np.fromfile(stream, self.dtype, int(ends[stop - 1]) - done)
                    assert len(block) == ends[stop - 1] - done, (self.prefix, len(block))  # the size was checked
                    yield from np.split(block, ends[start : stop - 1] - done)
                    start, done = stop, int(ends[stop - 1])

    def _document_lengths(self) -> Iterator[NDArray[np.int64]]:
        """Tokens of the documents, int64, block by block."""
        for start in range(0, self.num_documents, BLOCK_SEQUENCES):
            indices = self.indices[start : start + BLOCK_SEQUENCES + 1]
            lengths = self.lengths[indices[0] : indices[-1]]
            ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])
            yield np.diff(ends[indices - indices[0]])


def _read_header(idx: Path, header: bytes, num_bytes: int) -> tuple[np.dtype[Any], int, int]:
    """(type of the tokens, S, D + 1); `CorpusError` for another format, or a file that is not as long as it says."""
    if header[: len(MAGIC)] != MAGIC[: len(header)] or not header:
        raise CorpusError(
            f"{idx} is no index of Megatron's IndexedDataset: it begins with {header[:9]!r}, not {MAGIC!r}"
        )
    if len(header) < HEADER.size:
        raise CorpusError(f"{idx} has {num_bytes} bytes, its header alone has {HEADER.size}: it was cut; restore it")
    _, version, code, num_sequences, num_indices = HEADER.unpack(header)
    if version != VERSION:
        raise CorpusError(f"{idx} is of version {version} of Megatron's IndexedDataset, this program reads {VERSION}")
    dtype = np.dtype(TYPE_OF_CODE.get(code, np.float32)).newbyteorder("<")
    if not np.issubdtype(dtype, np.integer):
        known = ", ".join(str(code) for code, t in TYPE_OF_CODE.items() if np.issubdtype(t, np.integer))
        raise CorpusError(f"{idx} tells of elements of type {code}, not of token ids (types {known})")
    expected = HEADER.size + 12 * num_sequences + 8 * num_indices
    if num_bytes == expected + num_sequences and num_sequences:
        raise CorpusError(f"{idx} has a mode for each sequence: it is a multimodal dataset, a corpus holds text alone")
    if num_bytes != expected or num_indices < 1:
        raise CorpusError(
            f"{idx} has {num_bytes} bytes, {num_sequences} sequences and {num_indices} document indices take "
            f"{expected}: it was cut or changed; restore it"
        )
    return dtype, num_sequences, num_indices


def _arrays(
    mapped: NDArray[np.uint8], num_sequences: int, num_indices: int
) -> tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.int64]]:
    """(lengths, pointers, document indices)."""
    pointers = HEADER.size + 4 * num_sequences
    indices = pointers + 8 * num_sequences
    return (
        mapped[HEADER.size : pointers].view("<i4"),
        mapped[pointers:indices].view("<i8"),
        mapped[indices : indices + 8 * num_indices].view("<i8"),
    )


def _check_sequences(idx: Path, lengths: NDArray[np.int32], pointers: NDArray[np.int64], item_bytes: int) -> int:
    """The number of all tokens; `CorpusError` where sequences do not follow one another in the .bin."""
    num_tokens = 0
    for start in range(0, len(lengths), BLOCK_SEQUENCES):
        block = lengths[start : start + BLOCK_SEQUENCES].astype(np.int64)
        ends = num_tokens + np.cumsum(block)
        wrong = (block < 0) | (pointers[start : start + BLOCK_SEQUENCES] != (ends - block) * item_bytes)
        if wrong.any():
            i = int(np.argmax(wrong))
            raise CorpusError(
                f"{idx} is damaged: sequence {start + i} of {block[i]} tokens at byte {pointers[start + i]}, not "
                f"{(ends[i] - block[i]) * item_bytes}, where the one before ends; restore it"
            )
        num_tokens = int(ends[-1])
    return num_tokens


def _check_documents(idx: Path, indices: NDArray[np.int64], num_sequences: int) -> None:
    if indices[0] != 0 or indices[-1] != num_sequences:
        raise CorpusError(
            f"{idx} is damaged: its documents are sequences {indices[0]}..{indices[-1]} of 0..{num_sequences}"
        )
    for start in range(0, len(indices) - 1, BLOCK_SEQUENCES):
        falls = np.diff(indices[start : start + BLOCK_SEQUENCES + 1]) < 0
        if falls.any():
            raise CorpusError(f"{idx} is damaged: document {start + int(np.argmax(falls))} ends before it starts")


class MegatronWriter:
    """Writes a dataset of `num_documents` documents, each one sequence, of tokens of a vocabulary of `vocab_size` ids.

    Both files are written as they will be named, with `.partial` behind; `close` brings them to disk, `rename` gives
    them their names. Memory: none that grows. OSErrors are the caller's to tell.
    """

    def __init__(self, prefix: Path, num_documents: int, vocab_size: int) -> None:
        assert num_documents > 0, prefix  # Megatron cannot map an empty .bin
        self.dtype = token_type(vocab_size)
        self._files = (bin_file(prefix), idx_file(prefix))  # in this order: a reader looks for the index first
        self._num_documents, self._written, self._num_tokens = num_documents, 0, 0
        self._bin, self._idx = (partial_path(file).open("xb") for file in self._files)
        self._idx.write(HEADER.pack(MAGIC, VERSION, type_code(self.dtype), num_documents, num_documents + 1))

    def add_tokens(self, tokens: NDArray[Any]) -> None:
        """Append `tokens` [n]."""
        self._bin.write(tokens.astype(self.dtype).tobytes())

    def add_documents(self, ends: NDArray[np.int64]) -> None:
        """`ends` [n]: offsets behind the next documents, in tokens, rising. Raises `CorpusError` for a document that
        is too long for the format."""
        if not len(ends):
            return
        lengths = np.diff(ends, prepend=self._num_tokens)
        if int(lengths.max()) > MAX_SEQUENCE_TOKENS:
            raise CorpusError(
                f"document {self._written + int(lengths.argmax())} has {lengths.max()} tokens: Megatron's sequences "
                f"have at most {MAX_SEQUENCE_TOKENS}"
            )
        pointers = HEADER.size + 4 * self._num_documents
        indices = pointers + 8 * self._num_documents
        item_bytes = self.dtype.itemsize
        self._write_at(HEADER.size + 4 * self._written, lengths.astype("<i4"))
        self._write_at(pointers + 8 * self._written, ((ends - lengths) * item_bytes).astype("<i8"))
        self._write_at(indices + 8 * (self._written + 1), np.arange(1, len(ends) + 1, dtype="<i8") + self._written)
        self._written += len(ends)
        self._num_tokens = int(ends[-1])

    def _write_at(self, offset: int, values: NDArray[Any]) -> None:
        self._idx.seek(offset)
        self._idx.write(values.tobytes())

    def close(self) -> int:
        """Bring both files to disk; returns their bytes."""
        assert self._written == self._num_documents, (self._written, self._num_documents)
        num_bytes = 0
        for stream in (self._bin, self._idx):
            stream.flush()
            os.fsync(stream.fileno())
            num_bytes += stream.seek(0, os.SEEK_END)
            stream.close()
        return num_bytes

    def rename(self) -> None:
        """Give both files their names."""
        for file in self._files:
            partial_path(file).rename(file)

    def abandon(self) -> None:
        """Close and remove what was written."""
        for stream, file in zip((self._bin, self._idx), self._files, strict=True):
            with suppress(OSError):  # closing writes what is buffered, and fails again on a full disk
                stream.close()
            partial_path(file).unlink(missing_ok=True)
            file.unlink(missing_ok=True)
