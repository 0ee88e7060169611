"""Memory per rank: nothing is lost or counted twice over a layout, and dtypes have their sizes."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tiny_shapes import tiny_shapes

from engram_megatron.config import ParallelConfig, RunConfig
from engram_megatron.model.activation_memory import chunk_activation_bytes
from engram_megatron.model.counts import TensorSpec, count_parameters, parameter_specs
from engram_megatron.model.memory import RankMemory, rank_memory, rank_table_bytes
from engram_megatron.model.placement import rank_elements, rank_table_rows, specs_on
from engram_megatron.overrides import apply_overrides
from engram_megatron.presets import dense_4b, engram_27b, moe_27b


def _one_value(spec: TensorSpec) -> int:
    return 1


def _stages(config: RunConfig, world_size: int) -> list[RankMemory]:
    return [rank_memory(config, world_size, stage, _one_value) for stage in range(config.parallel.pipeline)]


@pytest.mark.parametrize("pipeline", [1, 2, 4])
def test_pipeline_stages_together_hold_every_parameter_once(pipeline: int) -> None:
    tiny = replace(tiny_shapes(), parallel=ParallelConfig(pipeline=pipeline))
    names = [spec.name for stage in range(pipeline) for spec in specs_on(tiny, stage)]
    assert sorted(names) == sorted(spec.name for spec in parameter_specs(tiny))
    counts = count_parameters(tiny)
    dense = counts.stored - counts.engram_tables
    assert sum(memory.weights for memory in _stages(tiny, pipeline)) == 4 * dense


def test_tensor_and_expert_ranks_divide_what_they_should() -> None:
    tiny = replace(tiny_shapes(), parallel=ParallelConfig(tensor=2, expert=4))
    held = {spec.name.removeprefix("decoder.layers.1."): spec for spec in parameter_specs(tiny)}

    def share(name: str) -> float:
        return rank_elements(held[name], tiny.parallel) / held[name].count

    assert share("mlp.experts.local_experts.0.linear_fc1.weight") == 1 / 4  # on average over the experts
    assert share("self_attention.linear_kv_down_proj.weight") == 1 / 2
    assert share("mlp.shared_experts.linear_fc2.weight") == 1 / 2
    assert share("output_layer.weight") == 1 / 2
    for whole in ("self_attention.kv_layernorm.weight", "mlp.router.weight", "engram.key_value.weight"):
        assert share(whole) == 1


def test_bfloat16_training_keeps_float32_masters_gradients_and_moments() -> None:
    config = replace(dense_4b(), parallel=ParallelConfig(pipeline=2))
    elements = count_parameters(config).stored
    mappings = count_parameters(config).by_part["hyper-connections"]  # in float32 throughout
    stages = _stages(config, 8)
    assert sum(memory.weights for memory in stages) == 2 * elements + 2 * mappings
    assert sum(memory.master_weights for memory in stages) == 4 * (elements - mappings)
    for kind in ("gradients", "optimizer_state"):
        assert sum(getattr(memory, kind) for memory in stages) == 4 * elements
    in_float32 = replace(config, training=replace(config.training, dtype="float32"))
    assert sum(memory.master_weights for memory in _stages(in_float32, 8)) == 0


def test_optimizer_state_counts_the_values_of_each_tensor() -> None:
    tiny = tiny_shapes()
    one = rank_memory(tiny, 1, 0, _one_value).optimizer_state
    embedding = rank_memory(tiny, 1, 0, lambda spec: 2 if spec.part == "token embedding" else 1).optimizer_state
    assert embedding - one == 4 * 4096 * 128


def test_tables_are_dealt_in_blocks_over_every_rank() -> None:
    config = engram_27b()
    assert config.engram is not None
    row_bytes = 80 * (2 + 2 + 8) + 4  # weight and its rest, two moments, last step
    assert rank_memory(config, 64, 0, _one_value).host_tables % (config.tables.block_rows * row_bytes) == 0
    # 72.4M rows of 964 bytes; the last blocks of 64 ranks may add 64 * 16384 rows, 1.4 %
    assert 64 * rank_table_bytes(config, 64).host == pytest.approx(72404232 * row_bytes, rel=1.45e-2)
    assert rank_table_rows(config, 1) == 72404232
    assert rank_memory(moe_27b(), 64, 0, _one_value).host_tables == 0


def test_first_stage_keeps_as_many_microbatches_as_there_are_stages() -> None:
    tiny = replace(tiny_shapes(), parallel=ParallelConfig(pipeline=4))
    assert [memory.passes_in_flight for memory in _stages(tiny, 4)] == [4, 3, 2, 1]
    one_batch = replace(tiny, training=replace(tiny.training, micro_batch_size=16))
    assert [memory.passes_in_flight for memory in _stages(one_batch, 4)] == [1, 1, 1, 1]


def test_activations_of_a_dense_layer_are_the_sum_of_kept_tensors() -> None:
    """One residual stream, no Engram, no experts, tiny shapes: summed by hand per token and layer in float32."""
    tiny = tiny_shapes()
    model = replace(tiny.model, moe=None, mhc=replace(tiny.model.mhc, num_streams=1))
    config = replace(tiny, engram=None, model=model)
    norms = 2 * 2 * 128  # input and output of both
    attention = 32 + 16 + 32 + 4 * (48 + 48 + 64 + 32)  # latent with rotary key, normalised; q, k, keys|values, output
    layer = norms + attention + 3 * 384
    head = 2 * 128 + 2 * 4096  # norm, logits and their softmax
    assert chunk_activation_bytes(config, 0, 0) == 4 * 256 * 4 * (4 * layer + head)


def test_activations_shrink_with_tensor_and_context_ranks() -> None:
    tiny = tiny_shapes()
    whole = chunk_activation_bytes(tiny, 0, 0)
    assert chunk_activation_bytes(replace(tiny, parallel=ParallelConfig(tensor=2)), 0, 0) == whole // 2
    # but keys and values of the whole sequence stand on every context rank: 4 heads, 48 and 64 wide, 4 layers
    keys_values = 4 * 256 * 4 * 4 * (4 * (48 + 64))
    in_two = chunk_activation_bytes(replace(tiny, parallel=ParallelConfig(context=2)), 0, 0)
    assert in_two == (whole - keys_values) // 2 + keys_values


def test_recomputation_keeps_less_and_full_keeps_the_input_of_each_layer() -> None:
    tiny = tiny_shapes()
    assert tiny.engram is not None

    def kept(recompute: str, *modules: str) -> int:
        overrides = [f"training.recompute={recompute}", "model.vocab_size=8"]
        overrides += [f"training.recompute_modules={','.join(modules)}"] if modules else []
        return chunk_activation_bytes(apply_overrides(tiny, overrides), 0, 0)

    none, tokens = kept("none"), 4 * 256
    for module in ("feed_forward", "mhc", "engram"):
        assert kept("full") < kept("selective", module) < none
    parts = sum(none - kept("selective", module) for module in ("feed_forward", "mhc", "engram"))
    assert none - kept("selective", "feed_forward", "mhc", "engram") == parts
    head = (2 * 128 + 2 * 8) * 4
    streams, memory = 4 * 4 * 128 * 4, 2 * tiny.engram.memory_dim * 4
    assert kept("full") == tokens * (streams + memory + head)
