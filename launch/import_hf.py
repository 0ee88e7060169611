"""Make a checkpoint of a Hugging Face folder: python launch/import_hf.py FOLDER TARGET [PRESET] [key=value ...]

FOLDER: what launch/export_hf.py wrote, or a DeepSeek-V3-style mixture of experts in bfloat16 or float32 (it comes
without Engram, with one residual stream); see docs/huggingface.md. The model is FOLDER's, all else PRESET's (default:
engram_27b). TARGET is for checkpoint.init_from; the command that trains on it is printed.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from engram_checkpoints.huggingface.import_folder import import_folder
from engram_megatron.errors import UsageError
from engram_megatron.overrides import overrides_between
from engram_megatron.presets import preset, preset_names

DEFAULT_PRESET = "engram_27b"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="with config.json and .safetensors files")
    parser.add_argument("target", type=Path, metavar="TARGET", help="checkpoint to make")
    parser.add_argument(
        "settings", nargs="*", metavar="PRESET key=value", help=f"{', '.join(preset_names())}; overrides"
    )
    parser.add_argument("--tokenizer", type=Path, metavar="PATH", help="tokenizer.json (default: FOLDER's)")
    return parser.parse_intermixed_args()


def main() -> int:
    arguments = parse()
    settings = arguments.settings
    name, overrides = (settings[0], settings[1:]) if settings and "=" not in settings[0] else (DEFAULT_PRESET, settings)
    try:
        base = preset(name)
        summary = import_folder(arguments.folder, arguments.target, base, overrides, tokenizer=arguments.tokenizer)
    except UsageError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    if summary.left_out:
        print(f"left out {len(summary.left_out)} tensors of multi-token prediction: {summary.left_out[0]}, ...")
    command = ["launch/train.py", name, *overrides_between(base, summary.config)]
    command += [f"checkpoint.init_from={arguments.target}", "run_dir=RUN_DIR", "data.corpus=CORPUS"]
    print(f"{arguments.target}: imported; train on it with\n  {shlex.join(command)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
