"""What dense Adam did to a row while it had no gradient, without having touched it.

Adam on a dense weight (Kingma & Ba, arXiv 1412.6980) moves a row with live moments in every step. Let a row be last
updated in step s, with moments m and v, and have no gradient in s+1 .. t. Its moments only decay, m_j = beta1^(j-s) m
and v_j = beta2^(j-s) v, so that without eps the weight moves by a multiple of one and the same vector:

    w_t = w - S[s] * m / sqrt(v),   S[s] = sum over j = s+1 .. t of c_j r^(j-s),
    c_j = lr_j sqrt(1 - beta2^j) / (1 - beta1^j),   r = beta1 / sqrt(beta2)

S is one number per step, whatever the size of the tables. Step t adds c_t r^(t-s) to S[s], which is nothing for steps s
that lie W behind, r^W < 1e-18: their sums are final, and a row that comes back after a million steps costs the same as
one that comes back after two.

eps. The closed form divides by sqrt(v) + eps in place of sqrt(v_j) / sqrt(1 - beta2^j) + eps. Its relative error is
below eps / sqrt(v) * sum (beta1/beta2)^k / sum r^k, about 2 eps / sqrt(v) for betas (0.9, 0.95); float32 stores no
sqrt(v) below 1e-19 for gradients that are normal numbers. So eps = 1e-20 counts for nothing, and eps up to
LARGEST_CLOSED_EPS changes the fifth digit of the movement of a row whose gradients are 1e-10. For a larger eps the
kernels step the row through the missed steps, at most W of them, exactly as dense Adam does.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

LARGEST_CLOSED_EPS = 1e-15
NEGLIGIBLE = 1e-18  # relative to a first step's movement: far below the precision of float64

Float64 = NDArray[np.float64]


class DecayTables(NamedTuple):
    """What the kernels look up, float64: by step s `sums` and `learning_rates`, by number of steps k the `powers`."""

    sums: Float64
    learning_rates: Float64
    powers1: Float64  # beta1^k
    powers2: Float64  # beta2^k


class CatchUp:
    """Adam's constants and the history of its steps that rows are caught up with; the same on all shards.

    `step` counts the steps that are complete. A step is: `update_rows` on every shard (it brings rows to `step` and
    then takes step `step + 1`), then `advance` once. The betas must not change within a run: moments that were left
    alone decay with those of now.
    """

    def __init__(self, beta1: float, beta2: float, eps: float) -> None:
        assert 0 <= beta1 < 1, beta1
        assert 0 < beta2 < 1, beta2
        assert eps >= 0, eps
        self.beta1, self.beta2, self.eps = beta1, beta2, eps
        self.step = 0
        self._ratio = beta1 / math.sqrt(beta2)
        self.window = steps_until_negligible(self._ratio)
        self._ratio_powers = np.power(self._ratio, np.arange(1 if self.window is None else self.window + 1))
        self._grow(1024)

    @classmethod
    def restore(cls, beta1: float, beta2: float, eps: float, sums: Float64, learning_rates: Float64) -> CatchUp:
        """The state that `sums` and `learning_rates` were taken from."""
        assert sums.shape == learning_rates.shape == (sums.size,), (sums.shape, learning_rates.shape)
        assert sums.size > 0
        catch_up = cls(beta1, beta2, eps)
        catch_up._grow(sums.size)
        catch_up.step = sums.size - 1
        catch_up._sums[: sums.size] = sums
        catch_up._learning_rates[: sums.size] = learning_rates
        return catch_up

    @property
    def sums(self) -> Float64:
        """A copy of S, float64 [step + 1]; S[0] stands for rows that never had a gradient and is 0."""
        return self._sums[: self.step + 1].copy()

    @property
    def learning_rates(self) -> Float64:
        """A copy of the learning rates, float64 [step + 1]; that of step 0, which is none, is 0."""
        return self._learning_rates[: self.step + 1].copy()

    @property
    def is_closed(self) -> bool:
        """Whether rows are caught up by the closed form, not by stepping."""
        return self.eps <= LARGEST_CLOSED_EPS

    def advance(self, lr: float) -> None:
        """Complete a step that was taken with `lr`."""
        step = self.step + 1
        if step >= self._sums.size:
            self._grow(2 * self._sums.size)
        size = lr * math.sqrt(1.0 - self.beta2**step) / (1.0 - self.beta1**step)
        first = 1 if self.window is None else max(1, step - self.window)
        # rows last updated in the steps first .. step - 1 are step - first .. 1 steps behind
        self._sums[first:step] += size * self._ratio_powers[step - first : 0 : -1]
        self._sums[step] = 0.0
        self._learning_rates[step] = lr
        self.step = step

    def tables(self) -> DecayTables:
        """What the kernels need, as views that `advance` changes."""
        end = self.step + 1
        return DecayTables(self._sums[:end], self._learning_rates[:end], self._powers1[:end], self._powers2[:end])

    def replay(self, learning_rates: Float64) -> None:
        """Forget all steps, and complete those of `learning_rates` (as the property gives them, without step 0)."""
        self.step = 0
        for lr in learning_rates.tolist():
            self.advance(lr)

    def _grow(self, size: int) -> None:
        """Make room for `size` steps from 0 on."""
        steps = np.arange(size)
        used = self.step + 1
        sums, learning_rates = np.zeros(size), np.zeros(size)
        if self.step > 0:
            sums[:used], learning_rates[:used] = self._sums[:used], self._learning_rates[:used]
        self._sums, self._learning_rates = sums, learning_rates
        self._powers1, self._powers2 = np.power(self.beta1, steps), np.power(self.beta2, steps)
        if self.window is None:
            self._ratio_powers = np.power(self._ratio, steps)


def steps_until_negligible(ratio: float) -> int | None:
    """The least W with ratio^W < NEGLIGIBLE; None for a ratio of 1 or more, whose powers do not vanish."""
    if ratio >= 1.0:
        return None
    if ratio == 0.0:
        return 1
    return math.ceil(math.log(NEGLIGIBLE) / math.log(ratio))
