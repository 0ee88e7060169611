"""Cuts the sources of a corpus into units of work, and says what a build was begun with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from engram_data.corpus_format import ArraySizes, TokenizerIdentity
from engram_data.documents import check_validation_fraction
from engram_data.errors import CorpusError
from engram_data.text_source import SourceFile, Span, find_text_files

# What one process tokenises in some ten seconds: the most that a kill costs, unless a compressed file is larger.
UNIT_BYTES = 2**24


@dataclass(frozen=True)
class FileState:
    """What tells that a file is still the one that was planned with."""

    num_bytes: int
    mtime_ns: int

    @classmethod
    def of(cls, file: SourceFile) -> FileState:
        """Raises `CorpusError` where there is no such file."""
        try:
            status = file.path.stat()
        except OSError as error:
            raise CorpusError(f"cannot read {file.path}: {error.strerror}") from None
        return cls(status.st_size, status.st_mtime_ns)


@dataclass(frozen=True)
class Unit:
    """Spans of at least one file, one after another in the order of the sources; `states`: of their files, in the plan.

    At most the first and the last span are parts of a file, and no file has two.
    """

    number: int
    spans: tuple[Span, ...]
    states: tuple[FileState, ...]
    num_bytes: int  # on disk


@dataclass(frozen=True)
class BuildPlan:
    """All that the corpus is a function of: equal plans give equal bytes."""

    sources: list[str]
    tokenizer: TokenizerIdentity
    validation_fraction: float
    token_sizes: ArraySizes
    unit_bytes: int
    files: list[SourceFile]
    states: list[FileState]

    @cached_property
    def sha256(self) -> str:
        """Of the whole plan."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()

    @property
    def num_bytes(self) -> int:
        """Of all files, on disk."""
        return sum(state.num_bytes for state in self.states)

    def to_json(self) -> dict[str, Any]:
        """The plan as `difference` reads it."""
        return {
            "options": {
                "sources": self.sources,
                "tokenizer": asdict(self.tokenizer),
                "validation fraction": self.validation_fraction,
                "token sizes": asdict(self.token_sizes),
                "bytes of a unit": self.unit_bytes,
            },
            "files": {str(f.path): [s.num_bytes, s.mtime_ns] for f, s in zip(self.files, self.states, strict=True)},
        }

    def difference(self, before: dict[str, Any]) -> str | None:
        """The first thing in which this plan is not `before`, the JSON of another one; None where they are equal."""
        now = self.to_json()
        for name, value in now["options"].items():
            if before["options"][name] != value:
                return f"{name}: {before['options'][name]} before, {value} now"
        for path, state in now["files"].items():
            old = before["files"].get(path)
            if old is None:
                return f"{path} is new"
            if old != state:
                return f"{path} was changed ({old[0]:,} bytes before, {state[0]:,} now)"
        gone = [path for path in before["files"] if path not in now["files"]]
        return f"{gone[0]} is gone" if gone else None

    def units(self) -> list[Unit]:
        """The units, in the order of the sources. Files that cannot be cut are whole in one; small ones share one."""
        units: list[Unit] = []
        spans: list[tuple[Span, FileState]] = []
        filled = 0
        for span, state, num_bytes in self._pieces():
            spans.append((span, state))
            filled += num_bytes
            if filled >= self.unit_bytes:
                units.append(_unit(len(units), spans, filled))
                spans, filled = [], 0
        if spans:
            units.append(_unit(len(units), spans, filled))
        return units

    def _pieces(self) -> Iterator[tuple[Span, FileState, int]]:
        for file, state in zip(self.files, self.states, strict=True):
            size = state.num_bytes
            if file.can_be_cut and size > self.unit_bytes:
                # Whole units first: what a file leaves over fills up with the next files.
                for start in range(0, size, self.unit_bytes):
                    stop = min(start + self.unit_bytes, size)
                    yield Span(file, start, stop), state, stop - start
            else:
                yield Span(file), state, size


def _unit(number: int, spans: Sequence[tuple[Span, FileState]], num_bytes: int) -> Unit:
    return Unit(number, tuple(span for span, _ in spans), tuple(state for _, state in spans), num_bytes)


def plan_build(
    sources: list[str],
    tokenizer: TokenizerIdentity,
    validation_fraction: float,
    token_sizes: ArraySizes,
    unit_bytes: int = UNIT_BYTES,
) -> BuildPlan:
    """Find the files. Raises `CorpusError` for a fraction outside 0 <= f < 1 and as `find_text_files` does."""
    check_validation_fraction(validation_fraction)
    files = find_text_files(sources)
    states = [FileState.of(file) for file in files]
    return BuildPlan(sources, tokenizer, validation_fraction, token_sizes, unit_bytes, files, states)
