"""The sums that catch a row up, against their definition, and their way through a checkpoint."""

import math

import numpy as np
import pytest

from engram_kernels.catch_up import NEGLIGIBLE, CatchUp, steps_until_negligible


def _rate(step: int) -> float:
    return 1e-3 * (1 + step % 7)


def _direct(last: int, step: int, beta1: float, beta2: float) -> float:
    ratio = beta1 / math.sqrt(beta2)
    return math.fsum(
        _rate(j) * math.sqrt(1 - beta2**j) / (1 - beta1**j) * ratio ** (j - last) for j in range(last + 1, step + 1)
    )


@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.9, 0.999), (0.0, 0.95), (0.97, 0.9)])
def test_sums_are_those_of_the_definition(betas: tuple[float, float]) -> None:
    catch_up = CatchUp(*betas, 1e-20)
    for step in range(1, 1301):  # longer than the window and than the first arrays
        catch_up.advance(_rate(step))
    sums = catch_up.sums
    assert sums.shape == (1301,)
    assert sums[0] == sums[1300] == 0.0
    for last in (1, 2, 500, 780, 1200, 1299):
        # ratio^k carries up to 1300 roundings of 1e-16 in the sums of (0.97, 0.9), whose terms grow
        assert sums[last] == pytest.approx(_direct(last, 1300, *betas), rel=1e-12, abs=0)


def test_window_ends_where_powers_are_negligible() -> None:
    window = steps_until_negligible(0.9)
    assert window is not None
    assert 0.9**window < NEGLIGIBLE <= 0.9 ** (window - 1)
    assert steps_until_negligible(0.0) == 1
    assert steps_until_negligible(1.0) is None


def test_restored_history_goes_on_to_the_bit() -> None:
    whole, resumed = CatchUp(0.9, 0.95, 1e-20), CatchUp(0.9, 0.95, 1e-20)
    resumed.advance(1.0)  # to be forgotten
    for step in range(1, 700):
        whole.advance(_rate(step))
        if step == 600:
            resumed.replay(whole.learning_rates[1:])
        if step > 600:
            resumed.advance(_rate(step))
    assert resumed.step == whole.step == 699
    np.testing.assert_array_equal(resumed.sums, whole.sums)
    np.testing.assert_array_equal(resumed.learning_rates, whole.learning_rates)
    for ours, theirs in zip(resumed.tables(), whole.tables(), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_history_of_no_steps_can_be_restored() -> None:
    resumed = CatchUp(0.9, 0.95, 1e-20)
    resumed.advance(1.0)
    resumed.replay(np.empty(0))
    assert resumed.step == 0
    assert resumed.sums.tolist() == [0.0]
