"""What a run needs of each of its nodes, from its config alone."""

from __future__ import annotations

from dataclasses import dataclass

from engram_megatron.config import RunConfig
from engram_megatron.config_tables import hot_rows, nvme_memory_bytes, record_bytes
from engram_megatron.model.counts import table_rows
from engram_megatron.model.layout_rules import check_layout
from engram_megatron.model.memory import TableBytes, rank_table_bytes
from engram_megatron.model.placement import rank_table_rows
from engram_megatron.tables.expected_rows import expected_touched_rows
from engram_megatron.tables.host_memory import scattered_bytes, touched_bytes
from engram_megatron.tables.row_layout import RowLayout
from engram_megatron.training.plan_layout import planned_memory

# NCCL and MPI keep the buffers between two ranks of a node in /dev/shm: NVIDIA asks for 1 GiB for 8 ranks. gloo keeps
# nothing there, Python a few semaphores. (Tables lie in memory without a name, which /dev/shm does not limit.)
SHM_BYTES_OF_RANK = {"gloo": 4 * 1024**2, "nccl": 128 * 1024**2, "mpi": 128 * 1024**2}


@dataclass(frozen=True, kw_only=True)
class NodeNeeds:
    """Of one node, in bytes. `model_bytes`: of host memory where there is no GPU for weights, gradients and states."""

    ranks: int  # of training, on this node
    table_bytes: int
    model_bytes: int
    nvme_bytes: int
    shm_bytes: int
    shm_bytes_with_gpus: int


def node_needs(config: RunConfig, num_nodes: int, ranks_per_node: int) -> NodeNeeds:
    """Needs of a run of `config` on `num_nodes` nodes. Activations are left out: they are an estimate.

    Raises `UsageError` for a layout that cannot work.
    """
    world_size = num_nodes * ranks_per_node
    config.validate()
    check_layout(config, world_size)
    tables = _table_bytes(config, world_size)
    of_model = max(memory.device - memory.activations for memory in planned_memory(config, world_size))
    of_transport = SHM_BYTES_OF_RANK["mpi" if config.tables.transport == "mpi" else "gloo"]
    return NodeNeeds(
        ranks=ranks_per_node,
        table_bytes=ranks_per_node * tables.host,
        model_bytes=ranks_per_node * of_model,
        nvme_bytes=ranks_per_node * tables.disk,
        shm_bytes=ranks_per_node * of_transport,
        shm_bytes_with_gpus=ranks_per_node * SHM_BYTES_OF_RANK["nccl"],
    )


def _table_bytes(config: RunConfig, world_size: int) -> TableBytes:
    """Of one rank; where memory is taken as rows are updated, of the rows that are expected to be."""
    tables = config.tables
    if config.engram is None or tables.commit == "eager":
        return rank_table_bytes(config, world_size)
    layout = RowLayout(table_rows(config.engram), tables.block_rows, world_size)
    num_rows, row_dim = rank_table_rows(config, world_size), config.engram.row_dim
    touched = min(num_rows, expected_touched_rows(config, layout))
    if tables.placement == "host":
        return TableBytes(touched_bytes(touched, num_rows, row_dim, tables.dtype, tables.moments), 0)
    num_hot = min(touched, hot_rows(num_rows, tables.hot_fraction))
    on_disk = scattered_bytes(touched, num_rows, record_bytes(row_dim, tables.dtype))
    return TableBytes(nvme_memory_bytes(num_rows, num_hot, row_dim, tables.dtype), on_disk)
