"""How the Engram tables are kept, fetched and updated. What they mean is `EngramConfig`'s."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Literal

from engram_megatron.config_fields import DType, check, free, path

LAST_STEP_BYTES = 4
INDEX_BYTES = LAST_STEP_BYTES + 4 + 1  # in memory of every row on NVMe: last step, place among the hot ones, past uses
HOT_ROW_BYTES = 8 + 1  # of every place for a hot row, beside the row: which row it is, and its uses
EXACT_BYTES = {"bfloat16": 4, "float32": 4, "float64": 8}  # of a weight with its remainder, and of a moment


def row_bytes(row_dim: int, dtype: DType, moments: int = 2) -> int:
    """Host memory of one row of the tables: weight, moments, the step as of which it stands."""
    return record_bytes(row_dim, dtype, moments) + LAST_STEP_BYTES


def record_bytes(row_dim: int, dtype: DType, moments: int = 2) -> int:
    """A row's weight and moments."""
    return row_dim * EXACT_BYTES[dtype] * (1 + moments)


def hot_rows(num_rows: int, hot_fraction: float) -> int:
    """Rows that a shard of `num_rows` on NVMe holds in memory: at least one, where it has any."""
    return min(num_rows, ceil(num_rows * hot_fraction))


def nvme_memory_bytes(num_rows: int, num_hot: int, row_dim: int, dtype: DType) -> int:
    """Host memory of a shard of `num_rows` on NVMe that holds `num_hot` of them in memory."""
    return num_rows * INDEX_BYTES + num_hot * (row_bytes(row_dim, dtype) + HOT_ROW_BYTES)


@dataclass(frozen=True, kw_only=True)
class TablesConfig:
    """Rows of all Engram layers, dealt over all ranks."""

    # What a gather reads. bfloat16: beside it lie 16 bits that make every weight an exact float32 number again, so that
    # training is float32's at 12 bytes per parameter (weight, rest, two moments), as float32 itself, with half the
    # bytes to gather and to send. float64 is for tests of equality.
    dtype: DType = "float32"
    # Rows are dealt to nodes, and there to ranks, in blocks of this many; a block is a chunk of a checkpoint: files of
    # 5 MiB, 18 thousand for engram_27b
    block_rows: int = free(16384)
    # host: all rows in memory. nvme: the hot ones, all others in a file of each rank in nvme_dir; the same numbers
    placement: Literal["host", "nvme"] = free("host")
    nvme_dir: str = path(free=True)  # of placement = nvme: a folder on a local disk of every host
    hot_fraction: float = free(0.2)  # of placement = nvme: share of the rows that have a place in memory
    # eager: all memory (and disk space) is taken at the start. lazy: a page when a row in it is first updated
    commit: Literal["eager", "lazy"] = free("eager")
    # transparent: asked of the kernel, which may refuse. reserved: those of /proc/sys/vm/nr_hugepages, or an error
    huge_pages: Literal["none", "transparent", "reserved"] = free("transparent")
    # Ranks that open each other's rows in shared memory; 0: those that run on one host
    ranks_per_node: int = free(0)
    # Between nodes. mpi: mpi4py, under mpirun or srun. nccl: through the GPUs
    transport: Literal["gloo", "mpi", "nccl"] = free("gloo")
    # dense: Adam as on one dense weight, in which rows move on after their gradient. touched: Adam on rows with a
    # gradient only. sinkhorn: balanced momentum (DeepSeek-V4.1), one moment, optimizer.sinkhorn_*
    update: Literal["dense", "touched", "sinkhorn"] = "dense"
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
            self.placement == "host" or self.nvme_dir != "",
            "tables.placement = nvme needs tables.nvme_dir=PATH, a folder on a local disk of every host",
        )
        check(
            self.placement == "nvme" or self.nvme_dir == "",
            f"tables.nvme_dir = {self.nvme_dir} needs tables.placement=nvme; set both or none",
        )
        check(
            self.placement == "host" or self.update != "sinkhorn",
            "tables.update = sinkhorn passes over all rows several times a step, which no disk keeps up with: set "
            "tables.placement=host or tables.update=dense",
        )
        check(0 < self.hot_fraction <= 1, f"tables.hot_fraction = {self.hot_fraction} must lie in (0, 1]")
        check(
            self.dtype != "bfloat16" or row_dim % 2 == 0,
            f"tables.dtype = bfloat16 needs rows of an even width, engram.memory_dim gives {row_dim} columns",
        )

    @property
    def moments(self) -> int:
        """Numbers that the optimizer keeps of each weight."""
        return 1 if self.update == "sinkhorn" else 2

    def memory_bytes(self, num_rows: int, row_dim: int) -> int:
        """Host memory of a shard of `num_rows` with all of it in use."""
        if self.placement == "nvme":
            return nvme_memory_bytes(num_rows, hot_rows(num_rows, self.hot_fraction), row_dim, self.dtype)
        return num_rows * row_bytes(row_dim, self.dtype, self.moments)

    def disk_bytes(self, num_rows: int, row_dim: int) -> int:
        """Disk space of a shard of `num_rows` with all of it in use."""
        return num_rows * record_bytes(row_dim, self.dtype) if self.placement == "nvme" else 0
