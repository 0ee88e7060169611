"""One unit of text to one piece: reads, tokenises in batches, writes. Runs in any process of a build."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from engram_data.build_folder import BuildPaths
from engram_data.build_plan import FileState, Unit
from engram_data.corpus_format import TokenizerIdentity, token_dtype
from engram_data.documents import split_of, with_eos
from engram_data.errors import CorpusError
from engram_data.piece import PieceSummary, PieceWriter, piece_path
from engram_data.text_source import Document, Rejection, SpanReader
from engram_data.tokenizer import CorpusTokenizer

# One call of the tokenizer: enough to feed its threads, small enough to stay out of the way of memory.
BATCH_CHARACTERS = 2**22
BATCH_DOCUMENTS = 2**12


@dataclass(frozen=True)
class UnitTask:
    """A unit to tokenise in the build of folder `root`; `eos`: the name of the end token, None: the usual one."""

    unit: Unit
    root: Path
    plan_sha256: str
    tokenizer: TokenizerIdentity
    eos: str | None
    validation_fraction: float


def tokenise_unit(task: UnitTask) -> PieceSummary:
    """Write the piece of `task.unit`.

    Raises `CorpusError` for text that cannot be read or was changed since the plan was made, and where the disk does
    not take the piece.
    """
    paths = BuildPaths(task.root)
    unit = task.unit
    temporary = paths.temporary_file(f"piece{unit.number}")
    try:
        piece = PieceWriter(temporary, token_dtype(task.tokenizer.vocab_size))
        try:
            lines = _fill(piece, task, _tokenizer(paths.tokenizer, task.tokenizer, task.eos))
            for span, state in zip(unit.spans, unit.states, strict=True):
                if FileState.of(span.file) != state:
                    raise CorpusError(f"{span.file.path} was changed while it was read")
            return piece.close(piece_path(paths.pieces, unit.number), task.plan_sha256, unit.number, lines)
        finally:
            piece.abandon()
            with suppress(OSError):
                temporary.unlink()
    except OSError as error:
        raise CorpusError(f"cannot write {task.root}: {error.strerror or error}") from None


@lru_cache(maxsize=1)  # a process has one tokenizer for all its units
def _tokenizer(path: Path, identity: TokenizerIdentity, eos: str | None) -> CorpusTokenizer:
    tokenizer = CorpusTokenizer(identity.name, path.read_bytes(), eos)
    assert tokenizer.identity == identity, (tokenizer.identity, identity)
    return tokenizer


def _fill(piece: PieceWriter, task: UnitTask, tokenizer: CorpusTokenizer) -> int:
    """Returns the number of lines of the unit's last span."""
    readers = [SpanReader(span) for span in task.unit.spans]

    def documents() -> Iterator[Document]:
        for reader in readers:
            for candidate in reader:
                if isinstance(candidate, Rejection):
                    piece.reject(candidate)
                else:
                    yield candidate

    for batch in _batches(documents()):
        encoded = tokenizer.encode_batch([document.text for document in batch])
        texts = [document.text.encode("utf-8") for document in batch]
        splits = [split_of(text, task.validation_fraction) for text in texts]
        piece.add([with_eos(ids, tokenizer.identity) for ids in encoded], splits)
        for document, text in zip(batch, texts, strict=True):
            piece.count(document.source, len(text))
    return readers[-1].num_lines


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= BATCH_CHARACTERS or len(batch) >= BATCH_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
