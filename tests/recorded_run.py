"""Notes which samples the model is really fed, as their tokens, for tests of what a run has trained on.

As a program it is `launch/train.py` with the same arguments, and notes into the folder of the variable RECORDS.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


def record(folder: Path, die_in_step: int | None = None) -> None:
    """Note every training step of this process in a file of its own in `folder`: a line for each that has moved the
    weights, with its number (0-based) and the tokens of each sample. In step `die_in_step` something breaks."""
    from engram_megatron.training import trainer

    file = folder / f"{time.time_ns()}_{os.environ.get('RANK', '0')}"
    fed: list[bytes] = []
    make_microbatch, train_step = trainer.make_microbatch, trainer.Trainer.train_step

    def noting_microbatch(batch: Any, *arguments: Any, **options: Any) -> Any:
        fed.extend(np.append(row, label[-1]).tobytes() for row, label in zip(batch.tokens, batch.labels, strict=True))
        return make_microbatch(batch, *arguments, **options)

    def noting_step(self: trainer.Trainer, step: int, *arguments: Any, **options: Any) -> Any:
        fed.clear()  # validation is fed, too
        if step == die_in_step:
            raise RuntimeError(f"the test ends this rank in step {step}")
        result = train_step(self, step, *arguments, **options)
        with file.open("a") as stream:
            stream.write(f"{step} {' '.join(row.hex() for row in fed)}\n")
        return result

    trainer.make_microbatch = noting_microbatch
    trainer.Trainer.train_step = noting_step  # type: ignore[method-assign]


@dataclass(frozen=True)
class Trained:
    """`surviving`: samples by step, of the last time that the step was done; `all`: of every time. A sample that
    several ranks compute together counts once in a step."""

    surviving: dict[int, list[int]]
    all: set[int]


def read_records(folders: list[Path], sample_of: dict[bytes, int]) -> Trained:
    """What the starts of a run have trained on: a folder each, in their order. `sample_of`: number by tokens."""
    surviving: dict[int, list[int]] = {}
    everything: set[int] = set()
    for folder in folders:
        steps: dict[int, list[bytes]] = {}
        for file in sorted(folder.iterdir()):
            for line in file.read_text().splitlines():
                step, *rows = line.split()
                steps.setdefault(int(step), []).extend(bytes.fromhex(row) for row in rows)
        for step, fed in steps.items():
            surviving[step] = sorted({sample_of[row] for row in fed})
            everything.update(surviving[step])
    return Trained(surviving, everything)


if __name__ == "__main__":
    from train_program import train_module

    program = train_module()
    if "RANK" in os.environ or "--nproc-per-node=1" in sys.argv:  # else it only starts the ranks
        from engram_megatron import platform

        platform.install()
        record(Path(os.environ["RECORDS"]))
    sys.exit(program.main())
