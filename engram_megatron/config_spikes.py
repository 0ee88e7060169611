"""What a run does about spikes of its training loss."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from engram_megatron.config_fields import check, free


@dataclass(frozen=True, kw_only=True)
class SpikeConfig:
    """Roll back to a checkpoint from before a spike and skip the batches around it, as PaLM did (arXiv 2204.02311,
    section 5.1): about 20 times it went back to about 100 steps before a spike and skipped 200 to 500 batches; the loss
    did not spike there again.

    A spike is a loss that is not finite, at once, or `steps_in_a_row` losses that all lie more than `deviations`
    deviations above the median of the `window_steps` steps before them. OLMo-core leaves out single updates by the same
    rule (`SkipStepOptimizer`: mean and standard deviation, 128 steps, factor 6); median and median absolute deviation
    do not move with a few bad steps. LLM Foundry ends a run after 5 outliers in a row (`KillLossSpike`).
    """

    max_rollbacks: int = free(0)  # of the whole run; after that it ends and says so. 0: no rollbacks
    window_steps: int = free(128)
    deviations: float = free(6.0)  # median absolute deviations times 1.4826: standard ones, were losses normal
    steps_in_a_row: int = free(5)
    margin_steps: int = free(100)  # what is skipped begins this many steps before the first loss that was too high
    skip_steps: int = free(200)  # batches skipped, and more where the spike is only then noticed

    def validate(self, every_steps: int, keep_last: int) -> None:
        """`every_steps`, `keep_last`: of the checkpoints of the run."""
        for name in ("max_rollbacks", "margin_steps"):
            check(getattr(self, name) >= 0, f"spikes.{name} = {getattr(self, name)} must not be negative")
        for name in ("window_steps", "steps_in_a_row", "skip_steps"):
            check(getattr(self, name) >= 1, f"spikes.{name} = {getattr(self, name)} must be at least 1")
        check(0 < self.deviations < inf, f"spikes.deviations = {self.deviations} must be positive and finite")
        if self.max_rollbacks == 0:
            return
        check(
            every_steps > 0,
            "spikes.max_rollbacks needs checkpoints to go back to: set checkpoint.every_steps, or no rollbacks",
        )
        reach = self.margin_steps + self.steps_in_a_row
        check(
            keep_last == 0 or (keep_last - 1) * every_steps >= reach,
            f"spikes.max_rollbacks: a checkpoint from {self.margin_steps} + {self.steps_in_a_row} steps ago must be "
            f"there, but the last {keep_last} of every {every_steps} steps reach back {(keep_last - 1) * every_steps}; "
            f"set checkpoint.keep_last to {-(-reach // every_steps) + 1} or more (0: all)",
        )
