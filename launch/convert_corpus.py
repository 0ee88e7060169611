"""Megatron's IndexedDatasets (PREFIX.bin, PREFIX.idx) to a corpus, and a corpus to them.

  python launch/convert_corpus.py import data/web_text_document data/books_text_document corpora/mine --tokenizer T
  python launch/convert_corpus.py export corpora/mine data/mine    # data/mine_train.bin and .idx, validation too

Both stream in bounded memory, and leave nothing behind where they fail.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from engram_data.errors import CorpusError
from engram_data.megatron_export import export_megatron, open_splits
from engram_data.megatron_import import count_tokens, import_megatron
from engram_data.tokenizer import load_tokenizer


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True, metavar="import|export")
    taken = verbs.add_parser("import", help="datasets to a corpus")
    taken.set_defaults(run=run_import)
    taken.add_argument("prefixes", nargs="+", type=Path, metavar="PREFIX", help="paths without .bin and .idx")
    taken.add_argument("out", type=Path, metavar="OUT", help="folder to make")
    taken.add_argument("--tokenizer", required=True, metavar="T", help="a tokenizer.json, or the name deepseek-v3")
    taken.add_argument("--eos", metavar="TOKEN", help="end-of-document token (default: the tokenizer's usual one)")
    held_out = "share of documents held out, chosen by the hash of their ids (default: 0.05, 0 with --validation)"
    taken.add_argument("--validation-fraction", type=float, metavar="F", help=held_out)
    all_of = "a dataset all of whose documents are held out; may be repeated"
    taken.add_argument("--validation", type=Path, action="append", default=[], metavar="PREFIX", help=all_of)
    given = verbs.add_parser("export", help="a corpus to a dataset for each split")
    given.set_defaults(run=run_export)
    given.add_argument("corpus", type=Path, metavar="CORPUS")
    given.add_argument("prefix", type=Path, metavar="PREFIX", help="gives PREFIX_train.bin, PREFIX_train.idx, ...")
    return parser.parse_args()


def run_import(arguments: argparse.Namespace, update: Callable[[int], None], reset: Callable[[int], None]) -> None:
    tokenizer = load_tokenizer(arguments.tokenizer, arguments.eos)
    fraction = arguments.validation_fraction
    if fraction is None:
        fraction = 0.0 if arguments.validation else 0.05
    reset(count_tokens([*arguments.prefixes, *arguments.validation]))
    summary = import_megatron(arguments.prefixes, arguments.validation, arguments.out, tokenizer, fraction, update)
    for name, split in summary.splits.items():
        counts = f"{split.num_documents:,} documents, {split.num_tokens:,} tokens"
        print(f"{name}: {counts}, fingerprint {split.fingerprint}")
    eos = tokenizer.identity.eos_token_id
    kept = summary.num_documents - summary.num_eos_added
    print(f"{kept:,} documents ended with the eos id {eos} and kept it, {summary.num_eos_added:,} got one")
    if not kept:
        print(f"no document ended with id {eos}: if they end with another id, name its token with --eos TOKEN")


def run_export(arguments: argparse.Namespace, update: Callable[[int], None], reset: Callable[[int], None]) -> None:
    splits = open_splits(arguments.corpus)
    reset(sum(split.num_tokens for split in splits.values()))
    for written in export_megatron(splits, arguments.prefix, update):
        counts = f"{written.num_documents:,} documents, {written.num_tokens:,} tokens of {written.dtype}"
        print(f"{written.prefix}: {counts}, {written.num_bytes / written.num_tokens:.2f} bytes per token")


def main() -> int:
    arguments = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a terminated conversion removes what it wrote
    started = time.monotonic()
    try:
        with tqdm(unit="tok", unit_scale=True, disable=None) as progress:
            arguments.run(arguments, progress.update, progress.reset)
    except CorpusError as error:
        print(f"convert_corpus: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"{time.monotonic() - started:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
