"""Ranks for tests: see `engram_megatron.layouts.forked_ranks`."""

from engram_megatron.layouts.forked_ranks import RanksError, free_port, run_ranks

__all__ = ["RanksError", "free_port", "run_ranks"]
