"""A corpus to Megatron's IndexedDatasets, one for each split: streaming, in bounded memory, all or nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from engram_data.corpus import Corpus
from engram_data.corpus_format import SPLITS, partial_path
from engram_data.errors import CorpusError
from engram_data.megatron_format import MegatronWriter, bin_file, idx_file


@dataclass(frozen=True)
class ExportedSplit:
    """One dataset; `num_bytes` of its two files, `dtype` the name of its element type."""

    prefix: Path
    num_documents: int
    num_tokens: int
    num_bytes: int
    dtype: str


def split_prefix(prefix: Path, split: str) -> Path:
    """The prefix of the dataset of one split: PREFIX_train, PREFIX_validation."""
    return prefix.with_name(f"{prefix.name}_{split}")


def open_splits(corpus: Path) -> dict[str, Corpus]:
    """The splits of a corpus that hold documents. Raises `CorpusError` as `Corpus.open`, and where none does."""
    splits = {name: Corpus.open(corpus, name, cached_chunks=2) for name in SPLITS}
    filled = {name: split for name, split in splits.items() if split.num_documents}
    if not filled:
        raise CorpusError(f"{corpus} holds no document")
    return filled


def export_megatron(splits: dict[str, Corpus], prefix: Path, report: Callable[[int], None]) -> list[ExportedSplit]:
    """Write PREFIX_train and PREFIX_validation of what `open_splits` gives; a document is one sequence, eos included.

    `report` is called with the tokens written since the last call. Raises `CorpusError`, and leaves nothing behind,
    where a file exists, a chunk is damaged, or the disk does not take the data.
    """
    targets = {name: split_prefix(prefix, name) for name in splits}
    for target in targets.values():
        _check_free(target)
    writers: list[MegatronWriter] = []
    exported: list[ExportedSplit] = []
    try:
        prefix.parent.mkdir(parents=True, exist_ok=True)
        for name, corpus in splits.items():
            writer = MegatronWriter(targets[name], corpus.num_documents, corpus.tokenizer.vocab_size)
            writers.append(writer)
            _export_split(corpus, writer, report)
            num_bytes = writer.close()
            exported.append(
                ExportedSplit(targets[name], corpus.num_documents, corpus.num_tokens, num_bytes, writer.dtype.name)
            )
        for writer in writers:
            writer.rename()
    except BaseException as error:
        for writer in writers:
            writer.abandon()
        if isinstance(error, OSError):
            raise CorpusError(f"cannot write {prefix}: {error.strerror or error}") from None
        raise
    return exported


def _export_split(corpus: Corpus, writer: MegatronWriter, report: Callable[[int], None]) -> None:
    for start in range(0, corpus.num_tokens, corpus.chunk_tokens):
        stop = min(start + corpus.chunk_tokens, corpus.num_tokens)
        writer.add_tokens(corpus.tokens(start, stop))
        writer.add_documents(corpus.document_ends_between(start, stop))
        report(stop - start)


def _check_free(target: Path) -> None:
    for file in (bin_file(target), idx_file(target)):
        if file.exists():
            raise CorpusError(f"{file} exists: choose another prefix, or remove it first")
        if partial_path(file).exists():
            raise CorpusError(
                f"{partial_path(file)} exists: another export writes it, or was killed; in that case remove it"
            )
