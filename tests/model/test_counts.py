"""Parameter counts against what the papers publish, and tensors against the paper's formulas."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from engram_megatron.config import AttentionConfig, HyperConnectionConfig, ModelConfig, MoEConfig, RunConfig
from engram_megatron.model.counts import (
    buffer_specs,
    count_parameters,
    parameter_specs,
    table_rows,
    table_spec,
    tensor_specs,
)
from engram_megatron.presets import dense_4b, engram_27b, engram_40b, engram_tiny, moe_27b

# arXiv 2601.07372 table 5 rounds to 0.1B; the third digits are the sums over the published dimensions, done by hand.
PAPER = [
    (dense_4b, 4.133, 3.8, 0.0),
    (moe_27b, 26.717, 3.8, 0.0),
    (engram_27b, 26.726, 3.8, 5.792),
    (engram_40b, 39.467, 3.8, 18.534),
]


@pytest.mark.parametrize(("build", "total", "activated", "tables"), PAPER)
def test_counts_are_those_of_the_engram_paper(
    build: Callable[[], RunConfig], total: float, activated: float, tables: float
) -> None:
    counts = count_parameters(build())
    assert counts.total / 1e9 == pytest.approx(total, abs=1e-3)
    assert round(counts.activated / 1e9, 1) == activated
    assert counts.engram_tables / 1e9 == pytest.approx(tables, abs=1e-3)


@pytest.mark.parametrize(
    ("layers", "width", "heads", "expert_ffn", "experts", "total", "activated"),
    [
        (12, 1280, 16, 896, 64, 2.97, 0.612),
        (18, 1920, 24, 1280, 64, 9.18, 1.66),
        (30, 2560, 32, 1536, 72, 27.0, 4.14),
    ],
)
def test_counts_are_those_of_the_hyper_connection_paper(
    layers: int, width: int, heads: int, expert_ffn: int, experts: int, total: float, activated: float
) -> None:
    """arXiv 2512.24880 appendix A.1; it counts both vocabulary matrices in the total, one in the activated."""
    model = ModelConfig(
        num_layers=layers,
        hidden_size=width,
        dense_ffn_size=8 * expert_ffn,
        attention=AttentionConfig(num_heads=heads),
        moe=MoEConfig(num_experts=experts, expert_ffn_size=expert_ffn),
    )
    counts = count_parameters(RunConfig(name="mhc", model=model, engram=None))
    # the published numbers have three digits: half a unit of the last, 0.5 % at most
    assert counts.stored / 1e9 == pytest.approx(total, rel=5e-3)
    assert (counts.activated + counts.by_part["output head"]) / 1e9 == pytest.approx(activated, rel=5e-3)


def test_sparse_ratio_is_the_paper_s_74_percent() -> None:
    counts = count_parameters(engram_27b())
    assert counts.sparse_ratio == pytest.approx(0.743, abs=1e-3)
    budget = count_parameters(moe_27b()).sparse  # the budget before anything moved into tables
    assert 1 - counts.engram_tables / budget == pytest.approx(0.7435, abs=1e-4)
    assert count_parameters(moe_27b()).sparse_ratio == 1.0
    assert count_parameters(dense_4b()).sparse_ratio is None


def test_sparse_parameters_are_total_less_activated_without_vocabulary() -> None:
    for config in (engram_27b(), moe_27b(), engram_tiny()):
        counts = count_parameters(config)
        assert counts.sparse == counts.total - counts.by_part["output head"] - counts.activated


def test_table_rows_are_the_sums_of_primes_of_deepseek_s_demo() -> None:
    engram_27, engram_40 = engram_27b().engram, engram_40b().engram
    assert engram_27 is not None
    assert engram_40 is not None
    assert table_rows(engram_27) == 36199972 + 36204260
    assert table_rows(engram_40) == 115837464 + 115841428
    spec = table_spec(engram_27b())
    assert spec is not None
    assert spec.shape == (72404232, 80)
    assert table_spec(moe_27b()) is None


def test_names_are_unique_and_layers_are_numbered_from_zero() -> None:
    specs = tensor_specs(engram_27b())
    names = {spec.name for spec in specs}
    assert len(names) == len(specs)
    assert "decoder.layers.0.mlp.linear_fc1.weight" in names
    assert "decoder.layers.29.mlp.experts.local_experts.54.linear_fc2.weight" in names
    assert {spec.layer for spec in specs if spec.part == "Engram dense"} == {1, 14}  # the paper's layers 2 and 15
    assert all(f".{spec.layer}." in spec.name for spec in specs if spec.layer is not None)


def _shapes(config: RunConfig, layer: int) -> dict[str, tuple[int, ...]]:
    prefix = f"decoder.layers.{layer}."
    return {
        spec.name.removeprefix(prefix): spec.shape for spec in parameter_specs(config) if spec.name.startswith(prefix)
    }


def test_engram_switches_add_and_remove_their_tensors() -> None:
    tiny = engram_tiny()
    assert tiny.engram is not None
    width, memory, streams = 128, 128, 4
    full = _shapes(tiny, 1)
    assert full["engram.key_value.weight"] == ((1 + streams) * width, memory)
    assert full["engram.short_conv.weight"] == (streams * width, 1, 4)
    assert "engram.key_value.bias" not in full
    without_gate = _shapes(replace(tiny, engram=replace(tiny.engram, gate=False)), 1)
    assert without_gate["engram.key_value.weight"] == (width, memory)
    assert not {"engram.norm_query.weight", "engram.norm_key.weight"} & set(without_gate)
    without_conv = _shapes(replace(tiny, engram=replace(tiny.engram, conv=False, bias=True)), 1)
    assert not {"engram.norm_conv.weight", "engram.short_conv.weight"} & set(without_conv)
    assert without_conv["engram.key_value.bias"] == ((1 + streams) * width,)
    one_branch = _shapes(replace(tiny, engram=replace(tiny.engram, multi_branch=False)), 1)
    assert one_branch["engram.key_value.weight"] == (2 * width, memory)
    assert one_branch["engram.norm_query.weight"] == (1, width)
    assert not any(name.startswith("engram") for name in _shapes(tiny, 0))


def test_backbone_switches_add_and_remove_their_tensors() -> None:
    tiny = engram_tiny()
    assert tiny.model.moe is not None
    one_stream = replace(tiny, model=replace(tiny.model, mhc=HyperConnectionConfig(num_streams=1)))
    assert not any("mhc" in name for name in _shapes(one_stream, 1))
    assert _shapes(tiny, 1)["mhc_mlp.mapping.weight"] == (24, 4 * 128)
    compressed = replace(tiny.model, attention=replace(tiny.model.attention, query_lora_rank=48))
    queries = _shapes(replace(tiny, model=compressed), 1)
    assert "self_attention.linear_q_proj.weight" not in queries
    assert queries["self_attention.linear_q_up_proj.weight"] == (4 * 48, 48)
    unshared = replace(tiny.model, moe=replace(tiny.model.moe, num_shared_experts=0))
    assert not any("shared" in name for name in _shapes(replace(tiny, model=unshared), 1))


def test_balancing_biases_are_buffers_of_the_expert_layers_only() -> None:
    buffers = buffer_specs(engram_27b())
    assert [spec.layer for spec in buffers] == list(range(1, 30))
    assert {spec.shape for spec in buffers} == {(55,)}
    assert not {spec.name for spec in buffers} & {spec.name for spec in tensor_specs(engram_27b())}
    assert buffer_specs(dense_4b()) == []


def test_multi_token_prediction_is_stored_but_in_no_published_count() -> None:
    plain = engram_27b()
    config = replace(plain, model=replace(plain.model, mtp=replace(plain.model.mtp, num_layers=1)))
    ours, without = count_parameters(config), count_parameters(plain)
    assert (ours.total, ours.activated, ours.sparse_ratio) == (without.total, without.activated, without.sparse_ratio)
    layer = sum(spec.count for spec in parameter_specs(plain) if spec.layer == 29)  # the last one, of experts
    extra = 3 * 2560 + 2 * 2560**2  # three norms and the projection
    assert ours.stored - without.stored == ours.multi_token_prediction == layer + extra
