"""Going back to a checkpoint from before a spike of the loss, and on without the samples around it.

One file decides: once a line stands in `skipped_windows.jsonl`, the run has rolled back. Checkpoints that have read a
skipped sample are then moved to `checkpoints/rolled_back_NNN`: at once, or by the next resume where a crash came
between. Before the line nothing has happened: the run goes on from its newest checkpoint, and meets the same spike.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from engram_checkpoints.checkpoint_files import sync_files
from engram_checkpoints.rolled_back import rolled_back_folder, set_aside_in
from engram_checkpoints.train_state import TrainState
from engram_data.skipped_samples import Windows, has_read, positions_of, union
from engram_megatron.config import RunConfig
from engram_megatron.errors import UsageError
from engram_megatron.training.loss_spike import Spike, SpikesNotCuredError, checkpoint_before
from engram_megatron.training.parallel import Ranks
from engram_megatron.training.rollback_log import SKIPPED_FILE, Rollback, read_rollbacks, rollback_lines, windows_of
from engram_megatron.training.run_folder import RunFolder, step_of, write_text
from engram_megatron.training.together import Together
from engram_megatron.training.train_state import advice_on_damage


def roll_back(folder: RunFolder, config: RunConfig, ranks: Ranks, spike: Spike, skipped: Windows) -> Rollback:
    """Make a run that leaves out `skipped` one that goes on from before `spike`. No save is in flight. Collective.

    Raises:
        SpikesNotCuredError: on all ranks, where that has been done `spikes.max_rollbacks` times, no checkpoint from
            before the spike is left, or the run folder cannot be written.
    """

    def act() -> Rollback | None:
        return _roll_back(folder, config, spike, skipped) if ranks.is_first else None

    together = Together(ranks.host_group, (SpikesNotCuredError, UsageError, OSError), SpikesNotCuredError, str)
    rollback = together(act)[0]
    assert rollback is not None, "of the first rank"
    return rollback


def settle_rollbacks(folder: RunFolder, ranks: Ranks) -> tuple[Windows, bool]:
    """What the run in `folder` leaves out, and whether a checkpoint had still to be set aside. Collective, at a resume.

    Raises `UsageError` on all ranks where that cannot be read or done.
    """

    def act() -> tuple[Windows, bool] | None:
        return _settle(folder) if ranks.is_first else None

    settled = Together(ranks.host_group, (UsageError, OSError), UsageError, str)(act)[0]
    assert settled is not None, "of the first rank"
    return settled


def has_read_any(state: TrainState, windows: Windows) -> bool:
    """Whether the run that `state` was saved of had read a sample in `windows` by then."""
    num_samples = state.step * int(state.config["training"]["global_batch_size"])
    return has_read(num_samples, union(state.skipped_samples), windows)


def _roll_back(folder: RunFolder, config: RunConfig, spike: Spike, skipped: Windows) -> Rollback:
    spikes, done = config.spikes, read_rollbacks(folder.path)
    if len(done) >= spikes.max_rollbacks:
        raise SpikesNotCuredError(
            f"{spike.reason}; the run has rolled back {len(done)} times already (see {folder.path / SKIPPED_FILE}): "
            f"raise spikes.max_rollbacks = {spikes.max_rollbacks} and continue with --resume, or start from weights "
            "of an earlier checkpoint (checkpoint.init_from) with a lower learning rate"
        )
    complete = [step_of(path) for path in folder.complete_checkpoints()]
    checkpoint_step = checkpoint_before(complete, spike, spikes.margin_steps)
    if checkpoint_step is None:
        raise SpikesNotCuredError(
            f"{spike.reason}; no checkpoint from before it is left, the oldest is of step {complete[0]}: start anew, "
            "and keep more (checkpoint.keep_last)"
        )
    window_step = max(checkpoint_step, spike.first_step - 1 - spikes.margin_steps)
    stop_step = max(window_step + spikes.skip_steps, spike.step)
    batch = config.training.global_batch_size
    first, last = positions_of(np.array([window_step * batch, stop_step * batch - 1]), skipped)
    rollback = Rollback(
        time=time.time(),
        step=spike.step,
        reason=spike.reason,
        checkpoint_step=checkpoint_step,
        window_step=window_step,
        batches=stop_step - window_step,
        first_sample=int(first),
        stop_sample=int(last) + 1,
    )
    write_text(folder.path / SKIPPED_FILE, rollback_lines([*done, rollback]))
    sync_files(folder.path, ["."])  # the line is on disk before anything is moved
    _settle(folder)
    return rollback


def _settle(folder: RunFolder) -> tuple[Windows, bool]:
    rollbacks = read_rollbacks(folder.path)
    if not rollbacks:
        return (), False
    folder.lock()
    windows = windows_of(rollbacks)
    stale = _newest_that_have_read(folder.complete_checkpoints(), windows)
    set_aside_in(rolled_back_folder(folder.path, len(rollbacks)), stale)
    return windows, bool(stale)


def _newest_that_have_read(complete: Sequence[Path], windows: Windows) -> list[Path]:
    """Newest first: what an older checkpoint has read, newer ones have read, too."""
    stale = []
    for path in reversed(complete):
        with advice_on_damage():
            state = TrainState.read(path)
        if not has_read_any(state, windows):
            break
        stale.append(path)
    return stale
