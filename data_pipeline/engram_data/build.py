"""Text files to a corpus, by any number of workers, in steps that a build started again does not repeat.

The sources are cut into units (`build_plan`); workers tokenise each into a piece (`tokenise`), then make the shards of
the pieces (`assembly`); the first process hands out the work and writes what describes the corpus. No byte of the
corpus depends on who did what: units depend on the sources alone, and shards on the units' order.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import zarr

from engram_data.assembly import layouts_of, read_record, shard_tasks, write_shard
from engram_data.build_folder import BuildFolder, BuildPaths
from engram_data.build_plan import UNIT_BYTES, BuildPlan, Unit, plan_build
from engram_data.corpus_format import REJECTED_FILE, SPLITS, TOKEN_SIZES, ArraySizes, token_dtype
from engram_data.corpus_metadata import SplitSummary, describe_corpus, describe_split
from engram_data.errors import CorpusError
from engram_data.piece import PieceReader, PieceSummary, piece_path, read_summary
from engram_data.shard_writer import write_array_metadata
from engram_data.tokenise import UnitTask, tokenise_unit
from engram_data.tokenizer import CorpusTokenizer
from engram_data.workers import ThisProcess, Workers

StartWorkers = Callable[[int], AbstractContextManager[Workers]]


@dataclass(frozen=True)
class BuildProgress:
    """Counts so far, over all splits; `num_tokens` includes one eos per document. Bytes of the sources: on disk."""

    num_documents: int
    num_tokens: int
    num_rejected: int
    text_bytes: int
    source_bytes: int
    source_bytes_in_all: int
    num_shards: int = 0
    num_shards_in_all: int = 0


@dataclass(frozen=True)
class BuildSummary:
    """What was built; `stored_bytes`: the files of all splits, indices and metadata included."""

    splits: dict[str, SplitSummary]
    total: BuildProgress
    stored_bytes: int


def in_this_process(_num_units: int) -> AbstractContextManager[Workers]:
    """The workers of a build in one process."""
    return nullcontext(ThisProcess())


def build_corpus(
    sources: list[str],
    out: Path,
    tokenizer: CorpusTokenizer,
    validation_fraction: float,
    report: Callable[[BuildProgress], None],
    token_sizes: ArraySizes = TOKEN_SIZES,
    unit_bytes: int = UNIT_BYTES,
    start_workers: StartWorkers = in_this_process,
) -> BuildSummary:
    """Build the corpus `out` from files and folders of text.

    `report` is called at the start, with what an earlier build has left, and after every unit and shard;
    `start_workers(number of units)` gives the workers. The same sources, in the same order, give the same corpus, byte
    for byte, by any workers and after any number of kills: a build that is stopped leaves `out`.partial where there is
    anything to go on with. Raises `CorpusError` for whatever the user can correct (see `build_plan`, `text_source`,
    `build_folder`, `workers`), and where no document is left for training.
    """
    plan = plan_build(sources, tokenizer.identity, validation_fraction, token_sizes, unit_bytes)
    units = plan.units()
    with BuildFolder(out, plan, tokenizer) as folder:
        build = _Build(plan, units, tokenizer, folder.paths, report)
        with start_workers(len(units)) as workers:
            build.tokenise(workers)
            if not build.progress.num_documents:
                folder.remove()
                raise CorpusError(f"no document in {', '.join(sources)}: {build.why_none}")
            build.assemble(workers)
        splits = build.describe()
        folder.finish()
    files_of_splits = [file for split in splits for file in (out / split).rglob("*") if file.is_file()]
    return BuildSummary(splits, build.progress, sum(file.stat().st_size for file in files_of_splits))


class _Build:
    """The steps of one build, by the process that holds its folder."""

    def __init__(
        self,
        plan: BuildPlan,
        units: list[Unit],
        tokenizer: CorpusTokenizer,
        paths: BuildPaths,
        report: Callable[[BuildProgress], None],
    ) -> None:
        self._plan, self._units, self._tokenizer = plan, units, tokenizer
        self._paths, self._report = paths, report
        self._pieces: dict[int, PieceSummary] = {}
        self.progress = BuildProgress(0, 0, 0, 0, 0, plan.num_bytes)
        self.why_none = "the files are empty"  # where there is no document

    def tokenise(self, workers: Workers) -> None:
        """Make the pieces that are missing."""
        missing = []
        for unit in self._units:
            summary = read_summary(piece_path(self._paths.pieces, unit.number))
            if summary is not None and summary.plan_sha256 == self._plan.sha256:
                self._count(summary)
            else:
                missing.append(unit)
        self._report(self.progress)
        identity, eos = self._tokenizer.identity, self._tokenizer.eos
        fraction, sha256, root = self._plan.validation_fraction, self._plan.sha256, self._paths.root
        tasks = (UnitTask(unit, root, sha256, identity, eos, fraction) for unit in missing)
        for summary in workers.run(tokenise_unit, tasks):
            self._count(summary)
            self._report(self.progress)
        if self.progress.num_rejected and not self.progress.num_documents:
            first = next(self._rejections())
            self.why_none = (
                f"all {self.progress.num_rejected} lines were rejected, "
                f"the first ({first['file']}:{first['line']}) for: {first['reason']}"
            )

    def _count(self, piece: PieceSummary) -> None:
        self._pieces[piece.unit] = piece
        now = self.progress
        self.progress = replace(
            now,
            num_documents=now.num_documents + piece.total_documents,
            num_tokens=now.num_tokens + piece.total_tokens,
            num_rejected=now.num_rejected + piece.num_rejected,
            text_bytes=now.text_bytes + sum(counts["text_bytes"] for counts in piece.sources.values()),
            source_bytes=now.source_bytes + self._units[piece.unit].num_bytes,
        )

    def _totals(self, split: str) -> tuple[int, int]:
        """Tokens and documents of `split`."""
        pieces = self._pieces.values()
        return sum(p.num_tokens[split] for p in pieces), sum(p.num_documents[split] for p in pieces)

    def assemble(self, workers: Workers) -> None:
        """Write the shards that are missing."""
        pieces = [self._pieces[unit.number] for unit in self._units]
        root, sizes, vocab_size = self._paths.root, self._plan.token_sizes, self._plan.tokenizer.vocab_size
        self._layouts = {split: layouts_of(split, *self._totals(split), vocab_size, sizes) for split in SPLITS}
        num_shards = sum(a.sizes.num_shards(a.length) for layouts in self._layouts.values() for a in layouts)
        missing = [
            task
            for split, layouts in self._layouts.items()
            for task in shard_tasks(root, split, pieces, layouts)
            if read_record(self._paths, task.array, task.shard) is None
        ]
        written = num_shards - len(missing)
        self.progress = replace(self.progress, num_shards=written, num_shards_in_all=num_shards)
        for _ in workers.run(write_shard, missing):
            self.progress = replace(self.progress, num_shards=self.progress.num_shards + 1)
            self._report(self.progress)

    def describe(self) -> dict[str, SplitSummary]:
        """Write the metadata, the rejected lines and the summary."""
        corpus = self._paths.corpus
        for left in corpus.rglob("zarr.json"):  # of a build that was stopped here
            left.unlink()
        if self.progress.num_rejected:
            with (corpus / REJECTED_FILE).open("w", encoding="utf-8") as stream:
                stream.writelines(json.dumps(rejection) + "\n" for rejection in self._rejections())
        sources = {source: {"documents": 0, "text_bytes": 0} for source in self._plan.sources}
        for piece in self._pieces.values():
            for source, counts in piece.sources.items():
                sources[source] = {name: sources[source][name] + counts[name] for name in sources[source]}
        splits = {split: self._describe_split(split) for split in SPLITS}
        describe_corpus(
            corpus, self._tokenizer, self._plan.validation_fraction, self.progress.num_rejected, sources, splits
        )
        return splits

    def _describe_split(self, split: str) -> SplitSummary:
        path = self._paths.corpus / split
        path.mkdir(exist_ok=True)
        zarr.create_group(path, zarr_format=3)
        shards = {}
        for array in self._layouts[split]:
            records = [read_record(self._paths, array, shard) for shard in range(array.sizes.num_shards(array.length))]
            shards[array.name] = [record for record in records if record is not None]
            assert len(records) == len(shards[array.name]), array
            write_array_metadata(path, array.name, array.dtype, array.length, array.sizes, shards[array.name])
        return describe_split(path, self._plan.tokenizer, self._plan.sources, shards, *self._totals(split))

    def _rejections(self) -> Iterator[dict[str, Any]]:
        """All rejections in the order of the sources, their lines numbered through each file."""
        dtype = token_dtype(self._plan.tokenizer.vocab_size)
        lines_before = 0  # of the file that the unit's first span goes on with
        for unit in self._units:
            piece = self._pieces[unit.number]
            first = unit.spans[0]
            lines_before = lines_before if first.start else 0
            if piece.num_rejected:
                for rejection in PieceReader(piece_path(self._paths.pieces, unit.number), piece, dtype).rejections():
                    shift = lines_before if rejection["file"] == str(first.file.path) else 0
                    yield {**rejection, "line": rejection["line"] + shift}
            lines_before = piece.lines_of_last_span + (lines_before if len(unit.spans) == 1 else 0)
