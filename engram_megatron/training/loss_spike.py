"""When a training loss has spiked, by the rule of `SpikeConfig`, and what to go back to. All ranks have the same losses
and decide the same."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from engram_megatron.config_spikes import SpikeConfig

EXIT_ROLLED_BACK = 3  # of a run that has rolled back: the same command with --resume goes on
_NORMAL = 1.4826  # standard deviations of a normal distribution in its median absolute deviation


@dataclass(frozen=True)
class Spike:
    """Noticed after `step` (1-based); the loss of `first_step` was the first that was too high."""

    first_step: int
    step: int
    reason: str


class LossSpikeError(RuntimeError):
    """The loss has spiked; on every rank alike."""

    def __init__(self, spike: Spike) -> None:
        super().__init__(spike.reason)
        self.spike = spike


class RolledBackError(RuntimeError):
    """After a spike the run stands at an earlier checkpoint, with a window of samples to skip: a resume goes on."""


class SpikesNotCuredError(RuntimeError):
    """After a spike the run does not roll back: somebody has to look at it."""


class LossWatch:
    """The losses that the rule looks at. They belong to the state of a run: a resume decides as the unbroken run."""

    def __init__(self, config: SpikeConfig, losses: Sequence[float]) -> None:
        """`losses`: of the steps so far, or the last of them, oldest first."""
        self.config = config
        kept = config.window_steps + config.steps_in_a_row if config.max_rollbacks > 0 else 0
        self._losses: deque[float] = deque(losses, maxlen=kept)

    @property
    def losses(self) -> list[float]:
        """Oldest first; none where spikes are not looked for."""
        return list(self._losses)

    def add(self, step: int, loss: float) -> None:
        """The loss of `step` (1-based). Raises `LossSpikeError`."""
        self._losses.append(loss)
        spike = find_spike(self.losses, step, self.config)
        if spike is not None:
            raise LossSpikeError(spike)


def find_spike(losses: Sequence[float], step: int, config: SpikeConfig) -> Spike | None:
    """Whether the last of `losses`, of `step`, makes them a spike. They must reach back a whole window."""
    last = losses[-config.steps_in_a_row :]
    before = losses[: -config.steps_in_a_row][-config.window_steps :]
    if len(before) < config.window_steps:
        return None
    middle = median(before)
    limit = middle + config.deviations * _NORMAL * median(abs(loss - middle) for loss in before)
    if min(last) <= limit:
        return None
    first_step = step - config.steps_in_a_row + 1
    reason = (
        f"loss {last[0]:.4f} in step {first_step}, {last[-1]:.4f} in step {step}: over {limit:.4f}, "
        f"{config.deviations:g} deviations above the median of {config.window_steps} steps, {middle:.4f}"
    )
    return Spike(first_step, step, reason)


def checkpoint_before(steps: Sequence[int], spike: Spike, margin_steps: int) -> int | None:
    """Of `steps`, those of checkpoints, rising: the newest that is `margin_steps` older than the spike, else the oldest
    that is older at all, else None. Without any checkpoint a run goes on from its start, 0."""
    before = [step for step in steps if step < spike.first_step]
    if not before:
        return None if steps else 0
    return max((step for step in before if step < spike.first_step - margin_steps), default=before[0])
