"""Train a byte-level BPE tokenizer on text files.

  python launch/train_tokenizer.py data_pipeline/samples/sotu.jsonl.xz tokenizer.json --vocab-size 4096

SOURCES as for build_corpus.py. Ids 0, 1, 2 are <|bos|>, <|endoftext|>, <|pad|>. The same text gives the same bytes.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from engram_data.errors import CorpusError
from engram_data.tokenizer_training import train_tokenizer_file


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+", metavar="SOURCES", help="files or folders of text")
    parser.add_argument("out", type=Path, metavar="OUT.json", help="file to write; must not exist")
    parser.add_argument("--vocab-size", type=int, required=True, metavar="N", help="ids, special tokens included")
    parser.add_argument("--workers", type=int, metavar="N", help="threads (default: all cores)")
    return parser.parse_intermixed_args()


def main() -> None:
    args = parse()
    if args.workers is not None:
        os.environ["RAYON_NUM_THREADS"] = str(args.workers)  # how the tokenizers library takes it
    started = time.monotonic()
    try:
        result = train_tokenizer_file(args.sources, args.out, args.vocab_size)
    except CorpusError as error:
        print(f"train_tokenizer: {error}", file=sys.stderr)
        sys.exit(2)
    print(
        f"{args.out}: {args.vocab_size:,} tokens from {result.num_documents:,} documents, sha256 {result.sha256}, "
        f"{time.monotonic() - started:.1f} s"
    )
    for rejection in result.rejections[:1]:
        place = f"{rejection.file}:{rejection.line}"
        print(f"{len(result.rejections):,} lines rejected, the first is {place}: {rejection.reason}")


if __name__ == "__main__":
    main()
