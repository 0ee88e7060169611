"""Does conditional memory help at equal parameters and compute? Train engram_tiny and its MoE twin, print both.

The twin has no Engram: the tables' parameters are experts, Engram's dense parameters are feed-forward width, so that
total and activated parameters are equal (the differences are printed). Finished runs are not run again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from engram_megatron.config import RunConfig
from engram_megatron.errors import UsageError
from engram_megatron.model.budget import moe_twin
from engram_megatron.overrides import apply_overrides, overrides_between
from engram_megatron.presets import preset

TRAIN = Path(__file__).with_name("train.py")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="engram_tiny", help="a preset with Engram (default: %(default)s)")
    parser.add_argument("--corpus", required=True, metavar="DIR")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="one run folder per model and seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--nproc-per-node", type=int, default=1, metavar="N")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="applied to both models")
    return parser.parse_intermixed_args()


def validation_loss(arguments: argparse.Namespace, config: RunConfig, label: str, seed: int) -> float:
    """Train `config` with `seed` unless that was done, and read its last validation loss (nats per token)."""
    run_dir = arguments.out / f"{label}_seed{seed}"
    changes = overrides_between(preset(arguments.preset), config)
    command = [sys.executable, str(TRAIN), arguments.preset, "--resume", f"--nproc-per-node={arguments.nproc_per_node}"]
    run = [f"run_dir={run_dir}", f"data.corpus={arguments.corpus}", f"parallel.expert={arguments.nproc_per_node}"]
    seeds = [f"training.seed={seed}", f"data.shuffle_seed={seed}"]
    subprocess.run([*command, *changes, *run, *seeds], check=True)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return next(line["validation/loss"] for line in reversed(lines) if "validation/loss" in line)


def main() -> None:
    arguments = parse()
    pair = moe_twin(apply_overrides(preset(arguments.preset), arguments.overrides))
    print(pair.describe(), flush=True)
    losses = {
        label: [validation_loss(arguments, config, label, seed) for seed in arguments.seeds]
        for label, config in (("engram", pair.engram), ("moe", pair.moe))
    }
    print(pair.describe())
    print(f"validation loss (nats per token){'':8}" + "".join(f"seed {seed:<6}" for seed in arguments.seeds) + "mean")
    for label, values in losses.items():
        print(f"{label:<40}" + "".join(f"{value:<11.4f}" for value in values) + f"{statistics.mean(values):.4f}")


if __name__ == "__main__":
    try:
        main()
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)
