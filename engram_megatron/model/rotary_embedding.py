"""Rotary position embedding's angles, in the precision that the model needs.

megatron-core 0.19.2 computes them in float32 always, so that the scores of a float64 model depend on where in the
sequence two tokens stand by 1e-7, and its YaRN class cannot be made on a CPU under context parallelism (it pins
memory). In float32 the angles here are its, bit for bit.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from engram_megatron.config import AttentionConfig


class RotaryEmbedding:
    """RoPE (arXiv 2104.09864), or YaRN (arXiv 2309.00071, section 3.2 to 3.4) where the config says so.

    Angles are float64 for a float64 model, else float32: a bfloat16 model needs them exact to a small part of a turn
    at position 32,768.
    """

    def __init__(self, config: AttentionConfig, model_dtype: torch.dtype) -> None:
        self.config = config
        self.dtype = torch.float64 if model_dtype == torch.float64 else torch.float32

    @property
    def concentration(self) -> float:
        """What cosines and sines are multiplied by: YaRN's temperature, as far as the softmax scale does not hold it.

        DeepSeek-V2's two numbers: `yarn_mscale` here over `yarn_mscale_all_dim`, which is in the softmax scale.
        """
        config = self.config
        if config.rope != "yarn":
            return 1.0
        return _mscale(config.yarn_scale, config.yarn_mscale) / _mscale(config.yarn_scale, config.yarn_mscale_all_dim)

    def angles(self, runs: list[range], device: torch.device) -> Tensor:
        """Angles [T, 1, 1, rope_head_dim] in radians of the positions of `runs`, one run behind the other.

        The first half of the last dimension is repeated in the second, as megatron-core's `apply_rotary_pos_emb` wants.
        """
        runs_T = [torch.arange(run.start, run.stop, dtype=self.dtype, device=device) for run in runs]
        angles = torch.outer(torch.cat(runs_T), self._frequencies(device))
        return torch.cat([angles, angles], dim=-1)[:, None, None, :]

    def _frequencies(self, device: torch.device) -> Tensor:
        """Radians per position [rope_head_dim / 2]."""
        config = self.config
        dim = config.rope_head_dim
        exponents = torch.arange(0, dim, 2, dtype=self.dtype, device=device) / dim
        extrapolated = 1.0 / config.rope_theta**exponents
        if config.rope != "yarn":
            return extrapolated
        interpolated = 1.0 / (config.yarn_scale * config.rope_theta**exponents)
        # Pairs of channels that turn more often than beta_fast in the original length are left as they are, those that
        # turn less often than beta_slow are interpolated, a ramp between.
        low, high = math.floor(self._pair(config.yarn_beta_fast)), math.ceil(self._pair(config.yarn_beta_slow))
        low, high = max(low, 0), min(high, dim - 1)
        ramp = (torch.arange(dim // 2, dtype=self.dtype, device=device) - low) / (high - low if high > low else 0.001)
        kept = 1.0 - ramp.clamp(0, 1)
        return interpolated * (1 - kept) + extrapolated * kept

    def _pair(self, turns: float) -> float:
        """Number of the pair of channels, not an integer, that turns `turns` times in the original length."""
        config = self.config
        return (config.rope_head_dim * math.log(config.yarn_original_length / (turns * 2 * math.pi))) / (
            2 * math.log(config.rope_theta)
        )


def _mscale(scale: float, mscale: float) -> float:
    """YaRN's temperature (its Eq. 22, with DeepSeek-V2's weight `mscale`)."""
    return 1.0 if scale <= 1 else 0.1 * mscale * math.log(scale) + 1.0
