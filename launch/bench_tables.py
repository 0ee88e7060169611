"""Time the tables against torch, C, bare traffic and bare transports, on row ids of real text.

    python launch/bench_tables.py [--text PATH] [--only NAME] [--threads N] [--repeats N] [--cpu-time]

Needs the tokenizer of DeepSeek-V3 (installed with the extra `deepseek`) and about 10 GiB of memory. A ratio above 1
means that ours is faster; the target is the least ratio wanted. The exit code is 0 whatever the ratios are.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numba
import torch

from engram_data.errors import CorpusError
from engram_megatron.benchmarks import huge_tables, node_tables, nvme_tables, table_memory, table_training
from engram_megatron.benchmarks.measure import table
from engram_megatron.benchmarks.row_ids import SAMPLE, read_tokens
from engram_megatron.benchmarks.row_kernels import Setting, distinct, gather, hash_rows
from engram_megatron.benchmarks.row_updates import read, update, update_or_sweep, whole_path
from engram_megatron.errors import UsageError
from engram_megatron.layouts.forked_ranks import run_ranks

SECTIONS = (hash_rows, distinct, gather, read, update, update_or_sweep, whole_path)
# Those on several ranks or on a disk, which print lines of their own.
OTHER_SECTIONS: dict[str, Callable[[Setting], Iterator[str]]] = {
    "nvme": lambda setting: nvme_tables.lines(setting.text),
    "nodes": lambda setting: node_tables.lines(setting.text, NODE_ROWS, run_ranks),
    "training": lambda setting: table_training.lines(setting.num_threads, run_ranks),
    "memory": lambda setting: table_memory.lines(run_ranks),
    "huge": lambda setting: huge_tables.lines(run_ranks),
}
NODE_ROWS = 6_500_000  # 1 GiB of weights, 5 GiB of state
MAX_TOKENS = 2_000_000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, default=SAMPLE, metavar="PATH", help=".jsonl or .txt, plain, .xz or .gz")
    names = [section.__name__ for section in SECTIONS] + list(OTHER_SECTIONS)
    parser.add_argument("--only", choices=names, action="append", help="a part of the comparisons; may be repeated")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), metavar="N")
    parser.add_argument("--repeats", type=int, default=25, metavar="N", help="rounds whose median is taken")
    cpu_time = "processor time of one thread, for a machine that other programs use"
    parser.add_argument("--cpu-time", action="store_true", help=cpu_time)
    arguments = parser.parse_args()
    if arguments.cpu_time:
        arguments.threads = 1
    numba.set_num_threads(arguments.threads)
    torch.set_num_threads(arguments.threads)
    try:
        text = read_tokens(arguments.text, MAX_TOKENS)
    except (CorpusError, UsageError) as error:
        print(f"bench_tables: {error}", file=sys.stderr)
        return 2
    setting = Setting(text, arguments.threads, arguments.repeats, arguments.cpu_time)
    print(f"{text.num_tokens} tokens of {arguments.text}, {arguments.threads} threads")
    for section in SECTIONS:
        if arguments.only is None or section.__name__ in arguments.only:
            print("\n" + table(section(setting)), flush=True)
    for name, lines in OTHER_SECTIONS.items():
        if arguments.only is None or name in arguments.only:
            print(flush=True)
            for line in lines(setting):
                print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
