"""Engram's weights and tables for a model that was trained without: they add exactly zero at first, and learn.

All start as in a new model (see `initial_values` and `row_init`), but for the value projection, the first C rows of
`key_value.weight`, which is zero. So every value is zero, and with it the gated value and, since the taps are zero too,
the convolution's branch: the residual streams and the loss are those of the source to the bit.

    step 1   only the value projection has a gradient (gate * row, times what the streams want); it moves
    step 2   through it, rows, keys and gate norms have one; through values that are no longer zero, the taps
    step 3   with taps, the convolution's norm too

Zero tables under a random projection would be silent as well, but a row stays zero until it is first used, long after
the start: then the key is zero (the gate's root is flat there: it does not learn) and so is the value, whose gradient
the convolution's norm multiplies by 1 / sqrt(eps) = 316 once there are taps. Here no value is exactly zero after step
1, and the gate tells rows apart from the start.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from engram_checkpoints.table_format import TableDescription
from engram_checkpoints.tensor_source import TensorInfo
from engram_kernels.row_state import RowState, zero_rows
from engram_megatron.config import RunConfig
from engram_megatron.model.counts import parameter_specs
from engram_megatron.model.initial_values import initial_weight


class NewMemoryWeights:
    """The `TensorSource` of Engram's dense weights in the model of `config`, of type `dtype`."""

    def __init__(self, config: RunConfig, dtype: torch.dtype) -> None:
        self._config = config
        self.tensors = {
            spec.name: TensorInfo(spec.shape, dtype) for spec in parameter_specs(config) if spec.part == "Engram dense"
        }
        self._whole = lru_cache(maxsize=1)(self._draw)

    def read(self, name: str, rows: slice = slice(None)) -> torch.Tensor:
        """As of `TensorSource`."""
        return self._whole(name)[rows]

    def _draw(self, name: str) -> torch.Tensor:
        info, config = self.tensors[name], self._config
        weight = initial_weight(name, info.shape, seed=config.training.seed, std=config.model.init_std)
        if name.endswith("key_value.weight"):
            weight[: config.model.hidden_size] = 0
        return weight.to(info.dtype)


def table_of(config: RunConfig, total_rows: int) -> TableDescription:
    """Tables of `total_rows` that no step has moved: all rows are made from the seed, none is stored."""
    assert config.engram is not None
    return TableDescription(
        total_rows=total_rows,
        row_dim=config.engram.row_dim,
        block_rows=config.tables.block_rows,
        dtype=wide_dtype(config),
        step_count=0,
        update=config.tables.update,
        catch_up=None,
        initial={"seed": config.training.seed, "std": config.engram.init_std},
    )


def wide_dtype(config: RunConfig) -> str:
    """Of exact weights: bfloat16 tables save the float32 numbers that they are trained as."""
    return "float64" if config.tables.dtype == "float64" else "float32"


def rows_left_out(description: TableDescription, start: int, stop: int) -> RowState:
    """Rows start .. stop - 1, of which a writer reads the last steps alone."""
    return zero_rows(stop - start, description.row_dim, description.dtype, description.num_moments)
