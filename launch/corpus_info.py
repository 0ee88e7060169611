"""What is in a corpus, and whether it is whole: python launch/corpus_info.py CORPUS [--verify] [--samples N]

  python launch/corpus_info.py corpora/mine --samples 3
  python launch/corpus_info.py corpora/mine --engram engram_27b engram.rows_per_head=500000

Exit code 1: --verify found damage.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from engram_data.corpus import Corpus
from engram_data.corpus_report import corpus_report, sample_texts
from engram_data.errors import CorpusError
from engram_data.ngram_statistics import ngram_statistics
from engram_data.report_text import report_lines
from engram_data.verify_corpus import shard_bytes, verify_corpus
from engram_megatron.errors import UsageError
from engram_megatron.overrides import apply_overrides
from engram_megatron.presets import preset


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path, metavar="CORPUS")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the preset of --engram")
    parser.add_argument("--verify", action="store_true", help="read everything, and compare it with its checksums")
    parser.add_argument("--samples", type=int, default=0, metavar="N", help="beginnings of N documents (0)")
    sampled = "tokens whose n-grams are counted, spread over the training split (2^22; 0: none)"
    parser.add_argument("--ngram-tokens", type=int, default=2**22, metavar="N", help=sampled)
    parser.add_argument("--engram", metavar="PRESET", help="count the rows that batches of this preset read")
    parser.add_argument("--json", action="store_true", help="for machines; one object")
    arguments = parser.parse_intermixed_args()
    if arguments.overrides and arguments.engram is None:
        raise UsageError(f"{arguments.overrides[0]}: key=value belongs to --engram PRESET")
    for name in ("samples", "ngram_tokens"):
        if getattr(arguments, name) < 0:
            raise UsageError(f"--{name.replace('_', '-')} {getattr(arguments, name)} is negative")
    return arguments


def damage(path: Path) -> list[str]:
    with tqdm(total=shard_bytes(path), unit="B", unit_scale=True, unit_divisor=1024, disable=None) as progress:
        return verify_corpus(path, progress.update)


def rows_of_batches(arguments: argparse.Namespace, train: Corpus) -> dict[str, Any]:
    from engram_megatron.training.batch_rows import batch_rows  # loads numba, which nothing else here needs

    config = apply_overrides(preset(arguments.engram), arguments.overrides)
    return {
        "preset": config.name,
        "global_batch_size": config.training.global_batch_size,
        "batches": [asdict(rows) for rows in batch_rows(config, train)],
    }


def run() -> int:
    arguments = parse()
    report: dict[str, Any] = {}
    if arguments.verify:
        report["damage"] = damage(arguments.corpus)
    if not report.get("damage"):
        report |= corpus_report(arguments.corpus)
        train = Corpus.open(arguments.corpus, "train")
        if arguments.samples:
            report["samples"] = sample_texts(train, arguments.samples)
        if arguments.ngram_tokens:
            report["ngrams"] = asdict(ngram_statistics(train, arguments.ngram_tokens))
        if arguments.engram is not None:
            report["engram"] = rows_of_batches(arguments, train)
    print(json.dumps(report, indent=2, ensure_ascii=False) if arguments.json else "\n".join(report_lines(report)))
    return 1 if report.get("damage") else 0


def main() -> int:
    try:
        return run()
    except (CorpusError, UsageError) as error:
        print(f"corpus_info: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
