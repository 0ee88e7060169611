"""Export a checkpoint as a Hugging Face folder: python launch/export_hf.py CHECKPOINT OUT [--dtype bfloat16|float32]

OUT then loads with AutoModelForCausalLM.from_pretrained(OUT, trust_remote_code=True) and AutoTokenizer; see
docs/huggingface.md. One process, no GPU; a part of a tensor is in memory at a time. OUT appears when it is complete.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from engram_checkpoints.huggingface.export_folder import DTYPES, export_checkpoint
from engram_data.errors import CorpusError
from engram_megatron.errors import UsageError


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a step_XXXXXXXX folder")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to make")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights (default: the run's)")
    parser.add_argument("--shard-gib", type=float, default=4.0, metavar="G", help="size of a file (default: 4)")
    parser.add_argument("--tokenizer", type=Path, metavar="PATH", help="tokenizer.json (default: the corpus's)")
    arguments = parser.parse_args()
    if arguments.shard_gib <= 0:
        raise UsageError(f"--shard-gib {arguments.shard_gib} must be positive")
    return arguments


def main() -> int:
    started = time.monotonic()
    try:
        arguments = parse()
        export_checkpoint(
            arguments.checkpoint,
            arguments.out,
            tokenizer=arguments.tokenizer,
            dtype=arguments.dtype,
            shard_bytes=int(arguments.shard_gib * 1024**3),
            on_file=lambda name: print(f"wrote {name}", flush=True),
        )
    except (UsageError, CorpusError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"{arguments.out}: exported in {time.monotonic() - started:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
