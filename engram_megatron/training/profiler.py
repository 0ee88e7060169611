"""A torch.profiler trace of some steps of a run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from engram_megatron.config import TrainingConfig
from engram_megatron.training.run_folder import RunFolder


@contextlib.contextmanager
def profiler_of_steps(
    config: TrainingConfig, step: int, folder: RunFolder, rank: int, say: Callable[[str], None]
) -> Iterator[Any]:
    """torch.profiler over steps `profile_start`..`profile_stop - 1` (counted from 0, those that a start after `step`
    still does), or None; a Chrome trace per rank in `profile/`."""
    start, stop = max(config.profile_start, step), config.profile_stop
    if stop <= start:
        yield None
        return
    folder.profile.mkdir(parents=True, exist_ok=True)
    trace = folder.profile / f"rank_{rank}_steps_{start}_{stop}.json"
    schedule = torch.profiler.schedule(wait=start - step, warmup=0, active=stop - start, repeat=1)
    with torch.profiler.profile(
        schedule=schedule, on_trace_ready=lambda profile: profile.export_chrome_trace(str(trace))
    ) as profiler:
        yield profiler
    if trace.exists():
        say(f"profile {trace}")
