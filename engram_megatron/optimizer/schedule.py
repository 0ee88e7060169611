"""Learning rate as a pure function of the step: linear warm-up, constant peak, step decay.

DeepSeek LLM (arXiv 2401.02954, section 2.3), with the factors of the mHC paper's appendix A.1 as defaults.
"""

from __future__ import annotations

from dataclasses import dataclass

from engram_megatron.config_optimizer import OptimizerConfig
from engram_megatron.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class LearningRateSchedule:
    """See `learning_rate_schedule`."""

    peak: float
    warmup_steps: int
    decays: tuple[tuple[int, float], ...]  # (first step, factor of the peak), steps rising

    def at(self, step: int) -> float:
        """Learning rate of step `step`, counted from 0. The first step already moves: peak / warmup_steps."""
        factor = 1.0
        for start, decayed in self.decays:
            if step >= start:
                factor = decayed
        if step < self.warmup_steps:
            factor *= (step + 1) / self.warmup_steps
        return self.peak * factor


def learning_rate_schedule(optimizer: OptimizerConfig, num_steps: int) -> LearningRateSchedule:
    """The schedule of a run of `num_steps` steps: decays begin at `round(fraction * num_steps)`.

    Raises `UsageError` where the warm-up does not end within the run.
    """
    if optimizer.warmup_steps > num_steps:
        raise UsageError(
            f"optimizer.warmup_steps = {optimizer.warmup_steps} is longer than the run: training.num_steps = "
            f"{num_steps}; shorten the warm-up or train longer"
        )
    return LearningRateSchedule(
        peak=optimizer.learning_rate,
        warmup_steps=optimizer.warmup_steps,
        decays=tuple(
            (round(fraction * num_steps), factor)
            for fraction, factor in zip(optimizer.decay_fractions, optimizer.decay_factors, strict=True)
        ),
    )
