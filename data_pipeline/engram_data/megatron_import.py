"""Megatron's IndexedDatasets to a corpus: streaming, in bounded memory, all or nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engram_data.corpus_format import TOKEN_SIZES, ArraySizes
from engram_data.corpus_metadata import SplitSummary
from engram_data.documents import check_validation_fraction, split_of
from engram_data.errors import CorpusError
from engram_data.megatron_format import MegatronDataset
from engram_data.tokenizer import CorpusTokenizer
from engram_data.writer import CorpusWriter

REPORT_TOKENS = 2**20


@dataclass(frozen=True)
class ImportSummary:
    """What was imported; `num_eos_added`: documents that did not end with the eos id, and got one."""

    splits: dict[str, SplitSummary]
    num_documents: int
    num_eos_added: int


def import_megatron(
    train: Sequence[Path],
    validation: Sequence[Path],
    out: Path,
    tokenizer: CorpusTokenizer,
    validation_fraction: float,
    report: Callable[[int], None],
    token_sizes: ArraySizes = TOKEN_SIZES,
) -> ImportSummary:
    """Make the corpus `out` of the datasets with the prefixes `train`, in this order, and of `validation`.

    Documents of `validation` are held out; so is `validation_fraction` of those of `train`, by `split_of` their
    ids. The sequences of a document are joined. A document that ends with the tokenizer's eos keeps it, another
    one gets it. `report` is called with the tokens read since the last call. Raises `CorpusError`, and leaves nothing
    behind, for a dataset that is damaged, an id that the tokenizer does not have, and as `CorpusWriter`.
    """
    check_validation_fraction(validation_fraction)
    prefixes = [*train, *validation]
    for prefix in prefixes:
        if prefixes.count(prefix) > 1:
            raise CorpusError(f"{prefix} is given twice: its documents would be in the corpus twice")
    held_out = [False] * len(train) + [True] * len(validation)
    datasets = [MegatronDataset.open(prefix) for prefix in prefixes]
    sources: dict[str, dict[str, int]] = {}
    num_eos_added = 0
    with CorpusWriter(out, tokenizer, token_sizes) as writer:
        for dataset, is_held_out in zip(datasets, held_out, strict=True):
            tokens_before = writer.num_tokens
            fraction = None if is_held_out else validation_fraction
            num_eos_added += _import_dataset(dataset, writer, tokenizer, fraction, report)
            num_tokens = writer.num_tokens - tokens_before
            sources[str(dataset.prefix)] = {"documents": dataset.num_documents, "tokens": num_tokens}
        num_documents = writer.num_documents
        if num_documents == 0:
            raise CorpusError(f"no document in {', '.join(map(str, prefixes))}")
        splits = writer.finish(sources, validation_fraction)
    return ImportSummary(splits, num_documents, num_eos_added)


def _import_dataset(
    dataset: MegatronDataset,
    writer: CorpusWriter,
    tokenizer: CorpusTokenizer,
    validation_fraction: float | None,
    report: Callable[[int], None],
) -> int:
    """How many documents had no eos. `validation_fraction` None: all are held out."""
    eos = tokenizer.identity.eos_token_id
    num_eos_added = unreported = 0
    for number, document in enumerate(dataset.documents()):
        has_eos = len(document) > 0 and int(document[-1]) == eos
        num_eos_added += not has_eos
        ids = document[:-1] if has_eos else document  # the writer closes every document
        content = ids.astype("<u4").tobytes()  # the same whatever type they were stored as
        try:
            writer.add(ids, "validation" if validation_fraction is None else split_of(content, validation_fraction))
        except CorpusError as error:  # an id out of the vocabulary
            raise CorpusError(
                f"{dataset.prefix}, document {number}: {error}: give the tokenizer that made them"
            ) from None
        unreported += len(document)
        if unreported >= REPORT_TOKENS:
            report(unreported)
            unreported = 0
    report(unreported)
    return num_eos_added


def count_tokens(prefixes: Sequence[Path]) -> int:
    """Tokens of all datasets. Raises `CorpusError` as `MegatronDataset.open`."""
    return int(np.sum([MegatronDataset.open(prefix).num_tokens for prefix in prefixes], dtype=np.int64))
