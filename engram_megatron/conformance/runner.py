"""All cases of a directory, one after another. A case that cannot be checked has failed: nothing is skipped."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from engram_megatron.conformance.case import Case, Mismatch, read_manifest
from engram_megatron.conformance.compression import check_compression, tokenizer_name
from engram_megatron.conformance.module import check_module
from engram_megatron.conformance.ngram_hash import check_hash
from engram_megatron.errors import UsageError
from engram_megatron.hashing.vocab_projection import VocabProjection, build_vocab_projection


@dataclass(frozen=True)
class Result:
    """`difference`: the largest absolute float64 difference (0 for integers); `failure`: None, or what is wrong."""

    kind: str
    file: str
    difference: float
    failure: str | None


def run_cases(directory: Path, tokenizers: dict[str, Path]) -> Iterator[Result]:
    """Check every case of the manifest in `directory`. `tokenizers`: short name -> tokenizer.json.

    Raises `UsageError`, before the first result, where the directory holds no manifest with cases.
    """
    projections: dict[str, VocabProjection] = {}
    for case in read_manifest(directory):
        try:
            difference = _check(case, tokenizers, projections)
        except (Mismatch, UsageError) as error:
            yield Result(case.kind, case.file, float("nan"), str(error))
        except (OSError, KeyError, ValueError, TypeError, RuntimeError, zipfile.BadZipFile) as error:
            # vectors that are damaged or of another format: numpy, torch and zipfile raise these
            yield Result(case.kind, case.file, float("nan"), f"cannot be read: {type(error).__name__}: {error}")
        else:
            yield Result(case.kind, case.file, difference, None)


def _check(case: Case, tokenizers: dict[str, Path], projections: dict[str, VocabProjection]) -> float:
    match case.kind:
        case "compression":
            return check_compression(case, _projection(tokenizer_name(case), tokenizers, projections))
        case "hash":
            return check_hash(case, _projection(case.entry["config"]["tokenizer"], tokenizers, projections))
        case "module":
            return check_module(case, _projection(case.entry["config"]["tokenizer"], tokenizers, projections))
        case unknown:
            raise Mismatch(f"kind {unknown!r} is unknown: expected compression, hash or module")


def _projection(name: str, tokenizers: dict[str, Path], projections: dict[str, VocabProjection]) -> VocabProjection:
    """The projection of the tokenizer `name`, kept in `projections` for the cases after."""
    if name not in projections:
        if name not in tokenizers:
            raise Mismatch(f"no tokenizer {name!r} was given (--tokenizer {name}=PATH)")
        projections[name] = build_vocab_projection(tokenizers[name])
    return projections[name]
