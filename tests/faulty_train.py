"""`launch/train.py` in which something happens to rank 1, for tests/launch/test_faults.py. Its arguments are the same.

FAULT        "damage WHAT": a byte of a message changes on its way to rank 1, WHAT as transports call it; or
             "kill": rank 1 is killed when its gradients are exchanged and its rows not yet updated
FAULT_AFTER  exchanges of gradients before that
FAULT_FILE   made as it happens
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from train_program import train_module

from engram_megatron.gather.transport import GlooTransport
from engram_megatron.optimizer.row_adam import RowAdam

Int64 = NDArray[np.int64]


class Fault:
    """Counts this rank's exchanges of gradients, which are one per step, to know when it is due."""

    def __init__(self) -> None:
        self.what = os.environ["FAULT"]
        self.gradients_left = int(os.environ["FAULT_AFTER"])
        self.file = Path(os.environ["FAULT_FILE"])

    def damage(self, received: torch.Tensor, what: str) -> None:
        """The network's part: called with what has arrived from the other rank."""
        due = self.gradients_left == 0 and self.what == f"damage {what}" and not self.file.exists()
        if due and received.numel() > 0:
            self.file.touch()
            data = received.reshape(-1).view(torch.uint8)
            data[data.numel() // 2] ^= 1
        self.gradients_left -= what == "gradients"

    def kill(self) -> None:
        if self.gradients_left < 0 and self.what == "kill":
            self.file.touch()
            os.kill(os.getpid(), signal.SIGKILL)


def plant(fault: Fault) -> None:
    exchange, update = GlooTransport.exchange, RowAdam.step

    def faulty_exchange(
        self: GlooTransport, rows: torch.Tensor, sends: Int64, receives: Int64, *, what: str = "rows", out: Any = None
    ) -> torch.Tensor:
        received = exchange(self, rows, sends, receives, what=what, out=out)
        fault.damage(received, what)
        return received

    def faulty_update(self: RowAdam, *arguments: Any) -> None:
        fault.kill()
        update(self, *arguments)

    GlooTransport.exchange = faulty_exchange  # type: ignore[method-assign]
    RowAdam.step = faulty_update  # type: ignore[method-assign]


if __name__ == "__main__":
    program = train_module()
    if os.environ.get("RANK") == "1":
        plant(Fault())
    sys.exit(program.main())
