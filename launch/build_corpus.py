"""Tokenise text files into a corpus: a folder with a zarr group per split, the tokenizer and a summary.

  python launch/build_corpus.py data_pipeline/samples/sotu.jsonl.xz corpora/sotu --tokenizer deepseek-v3

SOURCES are files or folders of .jsonl (field `text`, one document per line) and .txt (one document per file), plain,
.xz or .gz. Lines that are no document are left out, counted, and listed in OUT/rejected.jsonl. OUT must not exist; it
appears when it is complete, and nothing is left where the build fails.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from pathlib import Path

from engram_data.build import BuildProgress, BuildSummary, build_corpus
from engram_data.errors import CorpusError
from engram_data.tokenizer import load_tokenizer


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+", metavar="SOURCES", help="files or folders of text")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to make")
    parser.add_argument("--tokenizer", required=True, metavar="T", help="a tokenizer.json, or the name deepseek-v3")
    parser.add_argument("--eos", metavar="TOKEN", help="end-of-document token (default: the tokenizer's usual one)")
    held_out = "share of documents held out, chosen by the hash of their text (default: 0.05)"
    parser.add_argument("--validation-fraction", type=float, default=0.05, metavar="F", help=held_out)
    parser.add_argument("--workers", type=int, metavar="N", help="threads of the tokenizer (default: all cores)")
    return parser.parse_intermixed_args()


class ProgressLine:
    """Prints one line every `interval_s`, over the last one on a terminal."""

    def __init__(self, interval_s: float) -> None:
        self.started = time.monotonic()
        self.interval_s, self.due = interval_s, self.started + interval_s

    def __call__(self, progress: BuildProgress) -> None:
        now = time.monotonic()
        if now >= self.due:
            self.due = now + self.interval_s
            rate = progress.num_tokens / (now - self.started)
            text = f"{progress.num_documents:,} documents, {progress.num_tokens:,} tokens, {rate:,.0f} tokens/s"
            print(text, end="\r" if sys.stderr.isatty() else "\n", file=sys.stderr, flush=True)


def print_summary(summary: BuildSummary, out: Path, seconds: float) -> None:
    for name, split in summary.splits.items():
        print(
            f"{name}: {split.num_documents:,} documents, {split.num_tokens:,} tokens, fingerprint {split.fingerprint}"
        )
    total = summary.total
    per_token = (
        f"{summary.stored_bytes / total.num_tokens:.2f} bytes ({total.text_bytes / total.num_tokens:.2f} of text)"
    )
    print(f"{out}: {per_token} per token, {seconds:.1f} s, {total.num_tokens / seconds:,.0f} tokens/s")
    if total.num_rejected:
        print(f"{total.num_rejected:,} lines rejected, see {out / 'rejected.jsonl'}")


def main() -> None:
    args = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a terminated build removes what it wrote
    if args.workers is not None:
        os.environ["RAYON_NUM_THREADS"] = str(args.workers)  # how the tokenizers library takes it
    started = time.monotonic()
    try:
        tokenizer = load_tokenizer(args.tokenizer, args.eos)
        summary = build_corpus(args.sources, args.out, tokenizer, args.validation_fraction, ProgressLine(2.0))
    except CorpusError as error:
        print(f"build_corpus: {error}", file=sys.stderr)
        sys.exit(2)
    print_summary(summary, args.out, time.monotonic() - started)


if __name__ == "__main__":
    main()
