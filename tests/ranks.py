"""Ranks for tests: see `engram_megatron.layouts.forked_ranks`."""

from engram_megatron.layouts.forked_ranks import free_port, run_ranks

__all__ = ["free_port", "run_ranks"]
