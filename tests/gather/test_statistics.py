"""The estimate of collisions against n-grams thrown at random."""

import numpy as np
import pytest

from engram_megatron.gather.statistics import collision_estimate


@pytest.mark.parametrize("ngrams_per_row", [0.01, 0.3, 2.0])
def test_collision_estimate_is_the_share_of_ngrams_beyond_the_first_of_each_row(ngrams_per_row: float) -> None:
    rows, ngrams = 200_000, int(200_000 * ngrams_per_row)
    hit = np.unique(np.random.default_rng(0).integers(0, rows, ngrams)).size
    assert collision_estimate(hit / rows) == pytest.approx(1 - hit / ngrams, abs=0.005)


def test_collision_estimate_at_both_ends() -> None:
    assert collision_estimate(0.0) == 0.0
    assert collision_estimate(1.0) == 1.0
