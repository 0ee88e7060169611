"""Tokenise text files into a corpus: a folder with a zarr group per split, the tokenizer and a summary.

  python launch/build_corpus.py data_pipeline/samples/sotu.jsonl.xz corpora/sotu --tokenizer deepseek-v3

SOURCES are files or folders of .jsonl (field `text`, one document per line) and .txt (one document per file), plain,
.xz or .gz. Lines that are no document are left out, counted, and listed in OUT/rejected.jsonl. OUT must not exist; it
appears when it is complete. Until then the work is in OUT.partial: the same command goes on there after a kill.

On many nodes, under an MPI launcher, one rank per core (docs/corpus.md):

  srun --mpi=pmi2 -n 512 python launch/build_corpus.py SOURCES OUT --tokenizer T
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
import traceback
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NoReturn

from engram_data.build import BuildProgress, BuildSummary, StartWorkers, build_corpus, in_this_process
from engram_data.build_plan import UNIT_BYTES
from engram_data.corpus_format import partial_path
from engram_data.errors import CorpusError
from engram_data.mpi_workers import MpiWorkers, serve_rank
from engram_data.tokenizer import load_tokenizer
from engram_data.workers import ProcessWorkers, Workers
from engram_megatron.errors import UsageError
from engram_megatron.training.mpi_launch import load_mpi, num_mpi_processes


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+", metavar="SOURCES", help="files or folders of text")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to make")
    parser.add_argument("--tokenizer", required=True, metavar="T", help="a tokenizer.json, or the name deepseek-v3")
    parser.add_argument("--eos", metavar="TOKEN", help="end-of-document token (default: the tokenizer's usual one)")
    held_out = "share of documents held out, chosen by the hash of their text (default: 0.05)"
    parser.add_argument("--validation-fraction", type=float, default=0.05, metavar="F", help=held_out)
    workers = "cores to use, one process each (default: all); under MPI threads of each rank (default: 1)"
    parser.add_argument("--workers", type=int, metavar="N", help=workers)
    unit = "text on disk that a process takes at a time, and that a kill costs it (default: 16)"
    parser.add_argument("--unit-mib", type=float, default=UNIT_BYTES / 2**20, metavar="M", help=unit)
    args = parser.parse_intermixed_args()
    if args.workers is not None and args.workers < 1:
        parser.error(f"--workers {args.workers} must be at least 1")
    if args.unit_mib * 2**20 < 1:
        parser.error(f"--unit-mib {args.unit_mib} must be above 0")
    return args


class ProgressLine:
    """Prints one line every `interval_s`, over the last one on a terminal; rates are of this start of the build."""

    def __init__(self, interval_s: float) -> None:
        self.interval_s = interval_s
        self.first: BuildProgress | None = None

    def __call__(self, progress: BuildProgress) -> None:
        now = time.monotonic()
        if self.first is None:
            self.first, self.started, self.due = progress, now, now + self.interval_s
            if progress.num_documents:
                done = f"{progress.num_documents:,} documents, {progress.num_tokens:,} tokens"
                print(f"going on: {done} are there", file=sys.stderr, flush=True)
        elif now >= self.due:
            self.due = now + self.interval_s
            text = self._text(progress, self.first, now - self.started)
            print(text, end="\r" if sys.stderr.isatty() else "\n", file=sys.stderr, flush=True)

    @staticmethod
    def _text(progress: BuildProgress, first: BuildProgress, seconds: float) -> str:
        if progress.num_shards_in_all:
            return f"{progress.num_shards:,} of {progress.num_shards_in_all:,} shards written"
        rate = (progress.num_tokens - first.num_tokens) / seconds
        share = progress.source_bytes / max(progress.source_bytes_in_all, 1)
        left = progress.source_bytes_in_all - progress.source_bytes
        eta = seconds * left / max(progress.source_bytes - first.source_bytes, 1)
        counts = f"{progress.num_documents:,} documents, {progress.num_tokens:,} tokens, {rate:,.0f} tokens/s"
        return f"{counts}, {share:.1%} of the bytes, {_duration(eta)} to go"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def start_local(cores: int) -> StartWorkers:
    """One process per core; where there are fewer units, their tokenizers share the cores as threads."""

    def start(num_units: int) -> AbstractContextManager[Workers]:
        num_processes = min(cores, num_units)
        if num_processes <= 1:
            os.environ["RAYON_NUM_THREADS"] = str(cores)  # how the tokenizers library takes it
            return in_this_process(num_units)
        return ProcessWorkers(num_processes, cores // num_processes)

    return start


def print_summary(summary: BuildSummary, out: Path, seconds: float, tokens_before: int) -> None:
    """`seconds` of this start of the build, which found `tokens_before` of an earlier one."""
    for name, split in summary.splits.items():
        print(
            f"{name}: {split.num_documents:,} documents, {split.num_tokens:,} tokens, fingerprint {split.fingerprint}"
        )
    total = summary.total
    per_token = (
        f"{summary.stored_bytes / total.num_tokens:.2f} bytes ({total.text_bytes / total.num_tokens:.2f} of text)"
    )
    print(
        f"{out}: {per_token} per token, {seconds:.1f} s, {(total.num_tokens - tokens_before) / seconds:,.0f} tokens/s"
    )
    if total.num_rejected:
        print(f"{total.num_rejected:,} lines rejected, see {out / 'rejected.jsonl'}")


def build(args: argparse.Namespace, start_workers: StartWorkers) -> int:
    """Returns the exit code."""
    started, progress = time.monotonic(), ProgressLine(2.0)
    try:
        tokenizer = load_tokenizer(args.tokenizer, args.eos)
        summary = build_corpus(
            args.sources,
            args.out,
            tokenizer,
            args.validation_fraction,
            progress,
            unit_bytes=int(args.unit_mib * 2**20),
            start_workers=start_workers,
        )
    except CorpusError as error:
        print(f"build_corpus: {error}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, Terminated) as stop:
        partial = partial_path(args.out)
        kept = f": {partial} is kept, the same command goes on; to start again remove it" if partial.exists() else ""
        print(f"build_corpus: stopped{kept}", file=sys.stderr)
        return 143 if isinstance(stop, Terminated) else 130
    tokens_before = progress.first.num_tokens if progress.first else 0
    print_summary(summary, args.out, time.monotonic() - started, tokens_before)
    return 0


class Terminated(BaseException):
    """SIGTERM came."""


def terminate(*_: object) -> NoReturn:
    raise Terminated


def main() -> None:
    args = parse()
    num_ranks = num_mpi_processes(os.environ)
    if num_ranks == 1:
        signal.signal(signal.SIGTERM, terminate)
        sys.exit(build(args, start_local(args.workers or len(os.sched_getaffinity(0)))))
    threads = args.workers or 1
    os.environ["RAYON_NUM_THREADS"] = str(threads)
    try:
        communicator, _ = load_mpi(num_ranks, "leave the launcher out")
    except UsageError as error:
        print(f"build_corpus: {error}", file=sys.stderr)
        sys.exit(2)
    if communicator.Get_rank():
        serve_rank(communicator)
        return
    signal.signal(signal.SIGTERM, terminate)
    try:
        code = build(args, lambda _num_units: MpiWorkers(communicator, threads))
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stderr.flush()
    if code:
        communicator.Abort(code)  # the other ranks wait for work, or do some


if __name__ == "__main__":
    main()
