"""Files of every rank, sent to another rank's disk over the network, in pieces."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from engram_checkpoints.checkpoint_files import FileSum, FileSums, SummedFile, difference

PIECE_BYTES = 64 * 1024**2  # of memory, once for what is sent and once for what is received


class Neighbours(NamedTuple):
    """The ranks of `group`, all ranks of the job, that this rank sends to and receives from. Everybody's `send_to`
    receives from it."""

    group: dist.ProcessGroup
    send_to: int
    receive_from: int

    def swap(self, outgoing: Tensor | None, incoming: Tensor | None) -> None:
        """Send the one and fill the other, both in the host's memory."""
        works = []
        if outgoing is not None:
            works.append(dist.isend(outgoing, self.send_to, group=self.group))
        if incoming is not None:
            works.append(dist.irecv(incoming, self.receive_from, group=self.group))
        for work in works:
            assert work is not None, "this rank is in the group"
            work.wait()


def swap_files(
    neighbours: Neighbours,
    folder: Path,
    files: Mapping[str, FileSum],
    received: FileSums,
    piece_bytes: int = PIECE_BYTES,
) -> None:
    """Send `files` below `folder`, and put those that come into the folder of `received`. All ranks call it.

    Raises `OSError`, after everything was sent and received, where a file could not be read, not be written, or is not
    what was sent: no rank waits for one that gave up.
    """
    theirs = _swap_lists(neighbours, files)
    outgoing, incoming = list(_pieces(files, piece_bytes)), list(_pieces(theirs, piece_bytes))
    buffers = torch.empty((2, piece_bytes), dtype=torch.uint8)
    source, target = _Source(folder), _Target(received, theirs)
    for number in range(max(len(outgoing), len(incoming))):
        sent = came = None
        if number < len(outgoing):
            sent = buffers[0, : outgoing[number].bytes]
            source.read(outgoing[number], memoryview(sent.numpy()))
        if number < len(incoming):
            came = buffers[1, : incoming[number].bytes]
        neighbours.swap(sent, came)
        if came is not None:
            target.write(incoming[number], memoryview(came.numpy()))
    target.finish()
    for problem in (source.problem, target.problem):
        if problem is not None:
            raise problem


class _Piece(NamedTuple):
    file: str
    start: int
    bytes: int
    is_last: bool


def _pieces(files: Mapping[str, FileSum], piece_bytes: int) -> Iterator[_Piece]:
    """Of the files that are not empty, one after the other."""
    for name, (size, _) in files.items():
        for start in range(0, size, piece_bytes):
            yield _Piece(name, start, min(piece_bytes, size - start), start + piece_bytes >= size)


def _swap_lists(neighbours: Neighbours, files: Mapping[str, FileSum]) -> dict[str, FileSum]:
    ours = torch.from_numpy(np.frombuffer(json.dumps(dict(files)).encode(), np.uint8).copy())
    size = torch.zeros(1, dtype=torch.int64)
    neighbours.swap(torch.tensor([ours.numel()]), size)
    theirs = torch.empty(int(size), dtype=torch.uint8)
    neighbours.swap(ours, theirs)
    return {name: FileSum(*file_sum) for name, file_sum in json.loads(theirs.numpy().tobytes()).items()}


class _Source:
    """Reads pieces of files below `folder`. After a `problem`, what it gives is not what they hold."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.problem: OSError | None = None

    def read(self, piece: _Piece, content: memoryview) -> None:
        try:
            with (self._folder / piece.file).open("rb", buffering=0) as stream:
                stream.seek(piece.start)
                done = 0
                while done < piece.bytes:  # a raw file may give a part only
                    found = stream.readinto(content[done:])
                    if not found:
                        raise OSError(f"{self._folder / piece.file} has become shorter")
                    done += found
        except OSError as error:
            self.problem = self.problem or error


class _Target:
    """Writes files piece by piece. After a `problem`, it drops what comes."""

    def __init__(self, received: FileSums, files: Mapping[str, FileSum]) -> None:
        self._received, self._files = received, files
        self._open: SummedFile | None = None
        self.problem: OSError | None = None

    def write(self, piece: _Piece, content: memoryview) -> None:
        if self.problem is not None:
            return
        try:
            if self._open is None:
                self._open = self._create(piece.file)
            self._open.write(content)
            if piece.is_last:
                self._close(piece.file)
        except OSError as error:
            self.problem = error

    def finish(self) -> None:
        """Make the empty files; nothing was sent for them."""
        try:
            for name, wanted in self._files.items():
                if wanted.bytes == 0 and self.problem is None:
                    self._open = self._create(name)
                    self._close(name)
        except OSError as error:
            self.problem = error
        if self._open is not None:
            self._open.close()

    def _create(self, name: str) -> SummedFile:
        path = self._received.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return SummedFile(path, self._received)

    def _close(self, name: str) -> None:
        assert self._open is not None
        self._open.close()
        self._open = None
        problem = difference(self._received.folder / name, self._received.sums()[name], self._files[name])
        if problem is not None:
            raise OSError(problem)
