"""How the Engram tables are kept in host memory, fetched and updated. What they mean is `EngramConfig`'s."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from engram_megatron.config_fields import DType, check, free


@dataclass(frozen=True, kw_only=True)
class TablesConfig:
    """Rows of all Engram layers, dealt over the host memory of all ranks."""

    # What a gather reads. bfloat16: beside it lie 16 bits that make every weight an exact float32 number again, so that
    # training is float32's at 12 bytes per parameter (weight, rest, two moments), as float32 itself, with half the
    # bytes to gather and to send. float64 is for tests of equality.
    dtype: DType = "float32"
    block_rows: int = (
        4096  # rows are dealt to nodes, and there to ranks, in blocks of this many; a chunk of a checkpoint
    )
    # eager: all memory is taken at the start. lazy: a page is taken when a row in it is first updated
    commit: Literal["eager", "lazy"] = free("eager")
    # transparent: asked of the kernel, which may refuse. reserved: those of /proc/sys/vm/nr_hugepages, or an error
    huge_pages: Literal["none", "transparent", "reserved"] = free("transparent")
    # Ranks that open each other's rows in shared memory; 0: those that run on one host
    ranks_per_node: int = free(0)
    # Between nodes. mpi: mpi4py, under mpirun or srun. nccl: through the GPUs
    transport: Literal["gloo", "mpi", "nccl"] = free("gloo")
    # dense: Adam as on one dense weight, in which rows move on after their gradient. touched: only rows with a gradient
    update: Literal["dense", "touched"] = "dense"
    # A step's rows come in this many waves: microbatches 0, 1, ... one by one, all others in the last
    waves: int = free(2)
    # Planning, fetching and updating run beside the model in a thread of their own; the numbers are the same
    overlap: bool = free(True)

    def validate(self, row_dim: int) -> None:
        for name in ("block_rows", "waves"):
            check(getattr(self, name) >= 1, f"tables.{name} = {getattr(self, name)} must be at least 1")
        check(
            self.ranks_per_node >= 0,
            f"tables.ranks_per_node = {self.ranks_per_node} must not be negative (0: the ranks of one host)",
        )
        check(
            self.dtype != "bfloat16" or row_dim % 2 == 0,
            f"tables.dtype = bfloat16 needs rows of an even width, engram.memory_dim gives {row_dim} columns",
        )
