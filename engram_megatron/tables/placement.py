"""Which placement a config asks for."""

from __future__ import annotations

from engram_megatron.config_tables import TablesConfig
from engram_megatron.tables.host_rows import HostPlacement
from engram_megatron.tables.nvme_placement import NvmePlacement
from engram_megatron.tables.row_store import Placement


def placement_of(tables: TablesConfig) -> Placement:
    """The placement of the rows of a run."""
    if tables.placement == "host":
        return HostPlacement(commit=tables.commit, huge_pages=tables.huge_pages)
    return NvmePlacement(
        folder=tables.nvme_dir,
        hot_fraction=tables.hot_fraction,
        commit=tables.commit,
        huge_pages=tables.huge_pages,
    )
