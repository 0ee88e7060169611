"""The built model against `counts`, which every plan, budget and checkpoint takes its numbers from: same tensors, same
names, same shapes."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from ranks import run_ranks

from engram_megatron.config import RunConfig
from engram_megatron.model.counts import buffer_specs, count_parameters, parameter_specs
from engram_megatron.overrides import apply_overrides
from engram_megatron.presets import dense_4b, engram_27b, engram_40b, engram_tiny, moe_27b

SMALL = ("model.num_layers=3", "model.hidden_size=32", "model.vocab_size=96", "model.dense_ffn_size=48")
VARIANTS = {
    "engram": (),
    "moe": ("engram=none",),
    "dense": ("engram=none", "model.moe=none"),
    "no leading dense layer": ("model.moe.num_leading_dense_layers=0",),
    "no shared experts": ("model.moe.num_shared_experts=0",),
    "one stream": ("model.mhc.num_streams=1",),
    "one branch": ("engram.multi_branch=false",),
    "no gate": ("engram.gate=false",),
    "no convolution": ("engram.conv=false",),
    "bias": ("engram.bias=true",),
    "compressed queries": ("model.attention.query_lora_rank=16",),
    "multi-token prediction": ("model.mtp.num_layers=1",),
    "multi-token prediction, dense": ("model.mtp.num_layers=1", "model.moe=none", "model.mhc.num_streams=1"),
    "first layer": ("engram.layer_numbers=1,3",),
}
PRESETS = (dense_4b, moe_27b, engram_27b, engram_40b)


def _configs() -> dict[str, RunConfig]:
    small = {name: apply_overrides(engram_tiny(), [*SMALL, *changes]) for name, changes in VARIANTS.items()}
    full = {build.__name__: replace(build(), name=build.__name__) for build in PRESETS}
    return small | full


def _built(rank: int, world_size: int) -> dict[str, tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]]:
    """(shapes of parameters, shapes of balancing biases) by global name of every config, built on the meta device."""
    import torch
    from small_run import small_groups

    from engram_megatron.model.builder import build_model_chunks
    from engram_megatron.model.parameter_names import global_named_buffers, global_named_parameters

    shapes: dict[str, Any] = {}
    small_groups(_configs()["dense"], rank, world_size)
    for name, config in _configs().items():
        with torch.device("meta"):
            chunks = build_model_chunks(config)
        parameters = dict(global_named_parameters(chunks))
        assert all(parameter.is_meta for parameter in parameters.values()), name
        biases = {n: tuple(b.shape) for n, b in global_named_buffers(chunks) if n.endswith("expert_bias")}
        shapes[name] = ({n: tuple(p.shape) for n, p in parameters.items()}, biases)
    return shapes


@cache
def _shapes() -> dict[str, tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]]:
    return run_ranks(_built, 1)[0]


@pytest.mark.parametrize("name", _configs())
def test_built_parameters_are_those_that_are_counted(name: str) -> None:
    config, (built, _) = _configs()[name], _shapes()[name]
    assert built == {spec.name: spec.shape for spec in parameter_specs(config)}
    counts = count_parameters(config)
    assert sum(_count(shape) for shape in built.values()) == counts.stored - counts.engram_tables


@pytest.mark.parametrize("name", _configs())
def test_balancing_biases_are_those_that_are_listed(name: str) -> None:
    assert _shapes()[name][1] == {spec.name: spec.shape for spec in buffer_specs(_configs()[name])}


def _count(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
