"""Engram's weights and tables for a model that was trained without: they add exactly zero at first, and learn.

The weights start as in a new model, the rows at zero. So every value is zero, and with it the gated value and, since
the taps are zero too, the convolution's branch: the residual streams and the loss are those of the source to the bit.

    step 1   only the rows have a gradient, through the value projection; keys of zero have none (see `engram_gate`)
    step 2   where rows are no longer zero, projections, gate norms and taps have one
    step 3   with taps, the convolution's norm too

A row is zero until its first use, however late: it adds no noise to a model that was trained without it. That its value
is then exactly zero multiplies a part of its gradient by up to 1 / sqrt(conv_norm_eps) = 316 times the taps; Adam takes
the size away again. A zero value projection under random rows would be silent as well, and learned a little less in
three runs out of three (docs/upgrade.md).
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
        return initial_weight(name, info.shape, seed=config.training.seed, std=config.model.init_std).to(info.dtype)


def table_of(config: RunConfig, total_rows: int) -> TableDescription:
    """Tables of `total_rows` of zeros that no step has moved. None is stored: they are made, with a deviation of 0."""
    assert config.engram is not None
    return TableDescription(
        total_rows=total_rows,
        row_dim=config.engram.row_dim,
        block_rows=config.tables.block_rows,
        dtype=wide_dtype(config),
        step_count=0,
        update=config.tables.update,
        catch_up=None,
        initial={"seed": config.training.seed, "std": 0.0},
    )


def wide_dtype(config: RunConfig) -> str:
    """Of exact weights: bfloat16 tables save the float32 numbers that they are trained as."""
    return "float64" if config.tables.dtype == "float64" else "float32"


def rows_left_out(description: TableDescription, start: int, stop: int) -> RowState:
    """Rows start .. stop - 1, of which a writer reads the last steps alone."""
    return zero_rows(stop - start, description.row_dim, description.dtype, description.num_moments)
