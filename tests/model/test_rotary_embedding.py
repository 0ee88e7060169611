"""Rotary angles against megatron-core's in float32, and against the formulas in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from ranks import run_ranks
from small_run import small_groups, small_run_config

from engram_megatron.config import AttentionConfig
from engram_megatron.model.rotary_embedding import RotaryEmbedding

LENGTH = 40_000  # beyond the long phase's 32,768
PLAIN = AttentionConfig(rope_head_dim=64)
# The paper's long phase; a short rope whose ramp starts and ends at the same pair of channels.
YARN = AttentionConfig(rope_head_dim=64, rope="yarn", yarn_scale=10.0)
SHORT = AttentionConfig(rope_head_dim=8, rope="yarn", yarn_original_length=8, yarn_mscale=1.0)


def _megatron_angles(rank: int, world_size: int) -> dict[AttentionConfig, tuple[Any, float]]:
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding as Rope
    from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import YarnRotaryEmbedding as Yarn

    small_groups(small_run_config(), rank, world_size)
    found = {PLAIN: (Rope(64, 1.0, rotary_base=PLAIN.rope_theta).get_emb(LENGTH).numpy(), 1.0)}
    for a in (YARN, SHORT):
        angles, concentration = Yarn(
            a.rope_head_dim,
            rotary_base=a.rope_theta,
            scaling_factor=a.yarn_scale,
            original_max_position_embeddings=a.yarn_original_length,
            beta_fast=a.yarn_beta_fast,
            beta_slow=a.yarn_beta_slow,
            mscale=a.yarn_mscale,
            mscale_all_dim=a.yarn_mscale_all_dim,
        ).get_emb(LENGTH)
        found[a] = angles.numpy(), concentration
    return found


def test_angles_are_megatron_cores_bit_for_bit_in_float32() -> None:
    for config, (expected, concentration) in run_ranks(_megatron_angles, 1)[0].items():
        rotary = RotaryEmbedding(config, torch.bfloat16)
        angles = rotary.angles([range(LENGTH)], torch.device("cpu"))
        assert angles.dtype == torch.float32
        np.testing.assert_array_equal(angles.numpy(), expected)
        assert rotary.concentration == concentration


@pytest.mark.parametrize("config", [PLAIN, YARN, SHORT], ids=["plain", "yarn", "short"])
def test_angles_of_a_float64_model_are_exact_to_float64(config: AttentionConfig) -> None:
    dim = config.rope_head_dim
    pairs = np.arange(dim // 2)
    frequency = config.rope_theta ** (-2.0 * pairs / dim)
    if config.rope == "yarn":  # arXiv 2309.00071, definition 2, with the pair's index in place of its wavelength
        turns = np.array([config.yarn_beta_fast, config.yarn_beta_slow]) * 2 * np.pi / config.yarn_original_length
        low, high = -np.log(turns) / np.log(config.rope_theta) * dim / 2
        low, high = max(np.floor(low), 0), min(np.ceil(high), dim - 1)
        ramp = np.clip((pairs - low) / max(high - low, 1e-3), 0, 1)
        frequency = frequency * (1 - ramp) + frequency / config.yarn_scale * ramp
    expected = np.outer(np.arange(LENGTH), np.tile(frequency, 2))
    angles = RotaryEmbedding(config, torch.float64).angles([range(LENGTH)], torch.device("cpu"))
    np.testing.assert_allclose(angles[:, 0, 0].numpy(), expected, rtol=1e-13, atol=0)


def test_runs_of_positions_have_the_angles_of_the_whole() -> None:
    rotary = RotaryEmbedding(YARN, torch.float64)
    whole = rotary.angles([range(100)], torch.device("cpu"))
    runs = rotary.angles([range(10, 20), range(80, 90)], torch.device("cpu"))
    torch.testing.assert_close(runs, torch.cat([whole[10:20], whole[80:90]]), rtol=0, atol=0)
