"""The learning rate, computed by hand."""

import subprocess
import sys

import pytest

from engram_megatron.config_optimizer import OptimizerConfig
from engram_megatron.errors import UsageError
from engram_megatron.optimizer.schedule import learning_rate_schedule


def test_warms_up_from_the_first_step_and_decays_where_the_paper_does() -> None:
    schedule = learning_rate_schedule(OptimizerConfig(), num_steps=50000)
    expected = {
        0: 4e-4 / 2000,
        999: 2e-4,
        1999: 4e-4,
        2000: 4e-4,
        39999: 4e-4,
        40000: 4e-4 * 0.316,
        44999: 4e-4 * 0.316,
        45000: 4e-4 * 0.1,
        49999: 4e-4 * 0.1,
    }
    assert {step: schedule.at(step) for step in expected} == pytest.approx(expected, rel=1e-15)


def test_no_warmup_starts_at_the_peak() -> None:
    assert learning_rate_schedule(OptimizerConfig(warmup_steps=0), num_steps=10).at(0) == 4e-4


def test_no_decay_stays_at_the_peak() -> None:
    config = OptimizerConfig(warmup_steps=0, decay_fractions=(), decay_factors=())
    assert learning_rate_schedule(config, num_steps=10).at(9) == 4e-4


def test_decay_step_is_not_moved_by_rounding() -> None:
    # 0.7 * 10 is 7.000000000000001 in floating point.
    config = OptimizerConfig(warmup_steps=0, decay_fractions=(0.7,), decay_factors=(0.5,))
    schedule = learning_rate_schedule(config, num_steps=10)
    assert [schedule.at(6), schedule.at(7)] == [4e-4, 2e-4]


def test_warmup_beyond_the_run_is_refused() -> None:
    with pytest.raises(UsageError, match=r"warmup_steps = 11 .*num_steps = 10"):
        learning_rate_schedule(OptimizerConfig(warmup_steps=11), num_steps=10)
    assert learning_rate_schedule(OptimizerConfig(warmup_steps=10), num_steps=10).at(9) == pytest.approx(4e-5)


def test_schedule_and_rules_load_without_torch() -> None:
    program = (
        "import sys, engram_megatron.optimizer.schedule, engram_megatron.optimizer.parameter_groups;"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
