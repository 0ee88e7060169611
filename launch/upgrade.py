"""Make a checkpoint of one model the start of another: add Engram, trade experts for tables, grow tables.

  python launch/upgrade.py SOURCE TARGET PRESET data.corpus=DIR [key=value ...] [--experts FILE] [--memory GIB]

SOURCE is a checkpoint (RUN/checkpoints/step_00010000). PRESET and key=value name the model to make, in the words in
which launch/train.py will be told of it. What differs from SOURCE is done: Engram where it has none, fewer experts
(model.moe.num_experts), other rows (engram.rows_per_head, along the n-grams of data.corpus). See docs/upgrade.md.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from engram_data.errors import CorpusError
from engram_megatron.errors import UsageError
from engram_megatron.overrides import apply_overrides
from engram_megatron.presets import preset, preset_names
from engram_megatron.upgrade.upgrade import GIB, plan_upgrade, run_upgrade


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="SOURCE", help="a checkpoint folder")
    parser.add_argument("target", type=Path, metavar="TARGET", help="folder to make")
    parser.add_argument("preset", metavar="PRESET", help=", ".join(preset_names()))
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="strict overrides of the preset")
    kept = 'JSON of the experts to keep, {"decoder.layers.1": [0, 3, ...], ...} (default: the most wanted)'
    parser.add_argument("--experts", type=Path, metavar="FILE", help=kept)
    memory = "for table heads that are rehashed at a time; one head is the least (default: 8)"
    parser.add_argument("--memory", type=float, default=8.0, metavar="GIB", help=memory)
    return parser.parse_intermixed_args()


def main() -> int:
    arguments = parse()
    try:
        config = apply_overrides(preset(arguments.preset), arguments.overrides)
        upgrade = plan_upgrade(arguments.source, config, arguments.experts)
        run_upgrade(upgrade, arguments.target, max_bytes=int(arguments.memory * GIB), say=print)
    except (UsageError, CorpusError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    words = [arguments.preset, *arguments.overrides, f"checkpoint.init_from={arguments.target}"]
    print(f"start with   python launch/train.py {shlex.join(words)} run_dir=...")
    return 0


if __name__ == "__main__":
    sys.exit(main())
