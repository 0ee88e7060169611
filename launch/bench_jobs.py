"""Time jobs of Slurm: from submit to the first step, after faults, and what one waits for at the command line.

    python launch/bench_jobs.py [--folder PATH] [--repeats N] [--only NAME]

Brings up a local cluster (docs/local_cluster.md) of its own. All its nodes share this machine's cores: where others use
them too, only ratios of times that were taken in turns say something. The exit code is 1 where a limit is exceeded.
"""

from __future__ import annotations

import argparse
import json
import lzma
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from engram_data.build import build_corpus
from engram_data.tokenizer import CorpusTokenizer
from engram_data.tokenizer_training import train_tokenizer
from engram_megatron.benchmarks import job_times, status_times
from engram_megatron.benchmarks.cluster_run import NODES, BenchmarkError
from engram_megatron.benchmarks.limits import Limited, limits_table
from engram_megatron.errors import UsageError
from engram_megatron.local_cluster import cluster
from engram_megatron.local_cluster.settings import ClusterSettings

SAMPLE = Path(__file__).parents[1] / "data_pipeline/samples/sotu.jsonl.xz"
DOCUMENTS, VOCABULARY = 24, 1024
SECTIONS: dict[str, Callable[[ClusterSettings, Path, Path, int], Iterator[Limited]]] = {
    "status": lambda settings, folder, _corpus, repeats: status_times.status(settings, folder, repeats),
    "dry-run": job_times.dry_run,
    "start": job_times.starts,
    "faults": job_times.faults,
}


def make_corpus(folder: Path) -> Path:
    """Of the first addresses of the shipped sample."""
    with lzma.open(SAMPLE, "rt", encoding="utf-8") as stream:
        lines = [next(stream) for _ in range(DOCUMENTS)]
    (folder / "sample.jsonl").write_text("".join(lines), encoding="utf-8")
    tokenizer = train_tokenizer([json.loads(line)["text"] for line in lines], VOCABULARY)
    named = CorpusTokenizer("sample", tokenizer.encode())
    build_corpus([str(folder / "sample.jsonl")], folder / "corpus", named, 0.2, lambda _progress: None)
    return folder / "corpus"


def measure(folder: Path, repeats: int, only: list[str] | None) -> list[Limited]:
    corpus = make_corpus(folder)
    settings = cluster.up(folder / "cluster", NODES + 1, plain=False)  # one more than a run needs, to lose one
    rows: list[Limited] = []
    try:
        for name, section in SECTIONS.items():
            if only is None or name in only:
                measured = list(section(settings, folder, corpus, repeats))
                load, cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
                print(f"\n{limits_table(measured)}\nload {load:.1f} on {cores} cores", flush=True)
                rows += measured
    finally:
        cluster.down(folder / "cluster")
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--folder", type=Path, metavar="PATH", help="for the cluster and its runs, short (the system's)"
    )
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="rounds whose median is taken")
    parser.add_argument("--only", choices=list(SECTIONS), action="append", help="may be repeated")
    arguments = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory(prefix="jobs-", dir=arguments.folder) as folder:
            rows = measure(Path(folder), arguments.repeats, arguments.only)
    except (UsageError, BenchmarkError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 1 if any(row.is_missed for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
