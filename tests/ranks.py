"""Ranks for tests: see `engram_megatron.layouts.forked_ranks`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from engram_megatron.layouts.forked_ranks import RanksError, free_port, run_ranks

__all__ = ["RanksError", "free_port", "run_ranks", "slow_above_two"]


def slow_above_two(layouts: Sequence[Any]) -> list[Any]:
    """`layouts`, of which those of more than two `ranks` are marked slow, to parametrize a test with."""
    return [pytest.param(layout, marks=pytest.mark.slow) if layout.ranks > 2 else layout for layout in layouts]
