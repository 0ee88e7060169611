"""How weights move."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite

from engram_megatron.config_fields import check


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Muon (Moonlight's form, arXiv 2502.16982) for matrices, Adam for the rest; the tables have their own."""

    learning_rate: float = 4e-4
    warmup_steps: int = 2000
    # Step decay (DeepSeek LLM, arXiv 2401.02954): at these fractions of all steps, these factors of the peak.
    decay_fractions: tuple[float, ...] = (0.8, 0.9)
    decay_factors: tuple[float, ...] = (0.316, 0.1)
    weight_decay: float = 0.1
    clip_grad_norm: float = 1.0  # 0: no clipping
    muon_momentum: float = 0.95
    muon_nesterov: bool = True
    muon_ns_steps: int = 5
    muon_ns_coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315)
    muon_update_rms: float = 0.2  # update = this * sqrt(max(rows, columns)) * orthogonalised momentum
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-20
    table_learning_rate_multiplier: float = 5.0
    # Of tables.update = sinkhorn (DeepSeek-V4.1's report, Algorithm 1): momentum whose rows and columns are balanced
    sinkhorn_momentum: float = 0.95
    sinkhorn_steps: int = 11  # over rows and columns in turn, the first and the last over rows
    sinkhorn_row_threshold: float = 1e-3  # rows of at most this many mean norms stand still
    sinkhorn_update_rms: float = 0.18

    def validate(self) -> None:
        check(
            self.learning_rate > 0 and isfinite(self.learning_rate),
            f"optimizer.learning_rate = {self.learning_rate} must be positive and finite",
        )
        check(
            self.clip_grad_norm >= 0, f"optimizer.clip_grad_norm = {self.clip_grad_norm} must not be negative (0: off)"
        )
        for name in ("adam_beta1", "adam_beta2", "muon_momentum", "sinkhorn_momentum"):
            check(0 <= getattr(self, name) < 1, f"optimizer.{name} = {getattr(self, name)} must lie in [0, 1)")
        check(self.adam_beta2 > 0, f"optimizer.adam_beta2 = {self.adam_beta2} must be positive")
        check(self.adam_eps >= 0, f"optimizer.adam_eps = {self.adam_eps} must not be negative")
        check(self.muon_ns_steps >= 1, f"optimizer.muon_ns_steps = {self.muon_ns_steps} must be at least 1")
        check(
            self.sinkhorn_steps >= 1 and self.sinkhorn_steps % 2 == 1,
            f"optimizer.sinkhorn_steps = {self.sinkhorn_steps} must be odd: the first and the last are over rows",
        )
        for name in ("sinkhorn_row_threshold", "sinkhorn_update_rms"):
            check(getattr(self, name) >= 0, f"optimizer.{name} = {getattr(self, name)} must not be negative")
        check(
            len(self.decay_fractions) == len(self.decay_factors),
            f"optimizer.decay_fractions {self.decay_fractions} and decay_factors {self.decay_factors} differ in length",
        )
        check(
            list(self.decay_fractions) == sorted(self.decay_fractions) and all(0 < f < 1 for f in self.decay_fractions),
            f"optimizer.decay_fractions {self.decay_fractions} must rise within (0, 1)",
        )
        check(self.warmup_steps >= 0, f"optimizer.warmup_steps = {self.warmup_steps} must not be negative")
