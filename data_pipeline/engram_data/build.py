"""Text files to a corpus: reads, tokenises in batches, writes. One process; the tokenizer brings its own threads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from engram_data.corpus_format import TOKEN_SIZES, ArraySizes
from engram_data.corpus_metadata import SplitSummary
from engram_data.documents import split_of
from engram_data.errors import CorpusError
from engram_data.text_source import Document, find_text_files, read_documents
from engram_data.tokenizer import CorpusTokenizer
from engram_data.writer import CorpusWriter

# One call of the tokenizer: enough to feed all threads, small enough to stay out of the way of memory.
BATCH_CHARACTERS = 2**22
BATCH_DOCUMENTS = 2**12


@dataclass(frozen=True)
class BuildProgress:
    """Counts so far, over all splits; `num_tokens` includes one eos per document."""

    num_documents: int
    num_tokens: int
    num_rejected: int
    text_bytes: int


@dataclass(frozen=True)
class BuildSummary:
    """What was built; `stored_bytes`: the files of all splits, indices and metadata included."""

    splits: dict[str, SplitSummary]
    total: BuildProgress
    stored_bytes: int


def build_corpus(
    sources: list[str],
    out: Path,
    tokenizer: CorpusTokenizer,
    validation_fraction: float,
    report: Callable[[BuildProgress], None],
    token_sizes: ArraySizes = TOKEN_SIZES,
) -> BuildSummary:
    """Build the corpus `out` from files and folders of text; `report` is called after every batch.

    The same sources, in the same order, give the same corpus. Raises `CorpusError`, and leaves nothing behind, for
    whatever the user can correct (see `text_source`, `writer`), and where no document is left for training.
    """
    if not 0 <= validation_fraction < 1:
        raise CorpusError(f"validation fraction {validation_fraction} must lie in 0 <= fraction < 1")
    files = find_text_files(sources)
    counts = {source: {"documents": 0, "text_bytes": 0} for source in sources}
    text_bytes = 0
    with CorpusWriter(out, tokenizer, token_sizes) as writer:

        def progress() -> BuildProgress:
            return BuildProgress(writer.num_documents, writer.num_tokens, writer.num_rejected, text_bytes)

        for batch in _batches(read_documents(files, writer.reject)):
            encoded = tokenizer.encode_batch([document.text for document in batch])
            for document, token_ids in zip(batch, encoded, strict=True):
                writer.add(token_ids, split_of(document.text, validation_fraction))
                size = len(document.text.encode("utf-8"))
                counts[document.source]["documents"] += 1
                counts[document.source]["text_bytes"] += size
                text_bytes += size
            report(progress())
        total = progress()
        if total.num_documents == 0:
            raise CorpusError(f"no document in {', '.join(sources)}: {_why_none(writer)}")
        splits = writer.finish(counts, validation_fraction)
    files_of_splits = [file for split in splits for file in (out / split).rglob("*") if file.is_file()]
    return BuildSummary(splits, total, sum(file.stat().st_size for file in files_of_splits))


def _why_none(writer: CorpusWriter) -> str:
    first = writer.first_rejection
    if first is None:
        return "the files are empty"
    return f"all {writer.num_rejected} lines were rejected, the first ({first.file}:{first.line}) for: {first.reason}"


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
