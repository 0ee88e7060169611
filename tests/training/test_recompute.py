"""Recomputation changes what is kept, not what is computed: the same bits in every gradient, and fewer bytes kept."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
from ranks import run_ranks
from small_run import build_small_run, global_batch, microbatches, numbers, small_run_config

from engram_megatron.errors import UsageError

MODES = {
    "full": ("training.recompute=full",),
    **{
        modules: ("training.recompute=selective", f"training.recompute_modules={modules}")
        for modules in (
            "attention",
            "core_attention",
            "feed_forward",
            "mhc",
            "engram",
            "mhc,engram",
            "mhc,feed_forward",
            "core_attention,feed_forward,mhc,engram",
            "attention,feed_forward,mhc,engram",
        )
    },
}
TOGETHER = (
    "full",
    "mhc,engram",
    "core_attention",
    "attention,feed_forward,mhc,engram",
)  # in layouts other than the plain one
HEADS = "model.attention.num_heads=4"
LAYOUTS = {
    "1 rank": (1, ()),
    "1 rank, one stream": (1, ("model.mhc.num_streams=1",)),
    "1 rank, one branch": (1, ("engram.multi_branch=false",)),
    "1 rank, first layer": (1, ("engram.layer_numbers=1,3",)),
    "1 rank, without Engram": (1, ("engram=none",)),
    "pipeline 2": (2, ("parallel.pipeline=2",)),
    "pipeline 2, two chunks": (2, ("model.num_layers=4", "parallel.pipeline=2", "parallel.virtual_pipeline=2")),
    "context 2": (2, ("parallel.context=2",)),
    "tensor 2": (2, (HEADS, "parallel.tensor=2")),
    "expert 2": (2, ("parallel.expert=2",)),
    "tensor 2, expert 2": (2, (HEADS, "parallel.tensor=2", "parallel.expert=2")),
}


def _modes(layout: str) -> tuple[str, ...]:
    return tuple(MODES) if layout == "1 rank" else TOGETHER


def _step(rank: int, world_size: int, overrides: tuple[str, ...]) -> dict[str, Any]:
    """What one step of two microbatches computes."""
    from engram_megatron.model.parameter_names import global_named_parameters
    from engram_megatron.training.step_metrics import layer_metrics

    run = build_small_run(small_run_config("float64", overrides), rank, world_size)
    rows = {}
    if run.memory is not None:
        step = run.memory.step

        def record(gradients: Any, learning_rate: float, scale: float) -> None:
            rows["table rows"] = gradients.local_rows.copy()
            rows["table gradients"] = np.array(gradients.gradients)
            step(gradients, learning_rate, scale)

        run.memory.step = record
    mine = microbatches(global_batch(0), run.ranks.data_rank, run.ranks.data_ranks)
    result = run.trainer.train_step(0, mine, stop_requested=False)
    gradients = {name: numbers(p.main_grad) for name, p in global_named_parameters(run.chunks)}
    counts = {f"tokens per expert {layer}": numbers(c) for layer, c in run.trainer.runner.expert_tokens.items()}
    panels = {name: np.array(value) for name, value in layer_metrics(run.config, run.chunks, run.ranks).items()}
    return {"loss": np.array(result.loss), **gradients, **rows, **counts, **panels}


def _all_modes(rank: int, world_size: int) -> dict[tuple[str, str], list[str]]:
    """(layout, mode) to the names of what differs from a step without recomputation."""
    different = {}
    for layout, (ranks, overrides) in LAYOUTS.items():
        if ranks != world_size:
            continue
        expected = _step(rank, world_size, overrides)
        assert any(name.startswith("tokens per expert") for name in expected)
        for mode in _modes(layout):
            found = _step(rank, world_size, (*overrides, *MODES[mode]))
            assert found.keys() == expected.keys()
            different[layout, mode] = [n for n in expected if not np.array_equal(found[n], expected[n])]
    return different


@cache
def _differences(world_size: int) -> list[dict[tuple[str, str], list[str]]]:
    return run_ranks(_all_modes, world_size, timeout_s=300.0)


@pytest.mark.parametrize(("layout", "mode"), [(layout, mode) for layout in LAYOUTS for mode in _modes(layout)])
def test_loss_gradients_and_expert_counts_are_those_without_recomputation(layout: str, mode: str) -> None:
    for of_rank in _differences(LAYOUTS[layout][0]):
        assert of_rank[layout, mode] == []


def _interleaved(rank: int, world_size: int) -> dict[str, Any]:
    """Gradients of three microbatches whose backward passes run in another order than their forward passes."""
    import torch

    from engram_megatron.training.forward_step import forward_step, make_microbatch

    gradients: dict[str, Any] = {}
    for mode, changes in {"none": (), **MODES}.items():
        run = build_small_run(small_run_config("float64", changes), rank, world_size)
        batches = [microbatches(global_batch(step), 0, 1)[0] for step in range(3)]
        rows = run.memory.plan(batches)
        run.memory.fetch(rows)
        run.optimizer.zero_grad()
        losses = []
        for index, batch in enumerate(batches):
            memory = run.memory.of_microbatch(rows, index, 0)
            inputs = make_microbatch(batch, memory, separate_documents=True, cut_memory_at_documents=True)
            logits, loss = forward_step(iter([inputs]), run.chunks[0])
            losses.append(loss(logits)[0])
        for index in (1, 2, 0):
            losses[index].backward()
        flat = [numbers(p.main_grad).ravel() for p in run.chunks[0].parameters()]
        gradients[mode] = np.concatenate([*flat, rows.wait(run.memory.num_waves - 1).gradient.on_host().ravel()])
        assert torch.isfinite(torch.from_numpy(gradients[mode])).all()
    return gradients


def test_microbatches_in_flight_do_not_mix() -> None:
    gradients = run_ranks(_interleaved, 1)[0]
    for mode in MODES:
        np.testing.assert_array_equal(gradients[mode], gradients["none"], err_msg=mode)


def _kept(rank: int, world_size: int) -> dict[str, int]:
    """Bytes that one forward pass leaves behind, by mode."""
    from kept_bytes import kept_bytes
    from small_run import small_groups

    from engram_megatron.model.builder import build_model_chunks
    from engram_megatron.training.forward_step import forward_step, make_microbatch

    kept = {}
    for mode, changes in {"none": (), **MODES}.items():
        config = small_run_config("float32", changes)
        small_groups(config, rank, world_size)
        [model] = build_model_chunks(config)
        batch = global_batch(0)
        assert config.engram is not None
        memory = _memory(config.engram, *batch.tokens.shape)
        inputs = make_microbatch(batch, memory, separate_documents=True, cut_memory_at_documents=True)
        kept[mode] = kept_bytes(lambda inputs=inputs, model=model: forward_step(iter([inputs]), model)[0])
    return kept


def _memory(engram: Any, sequences: int, length: int) -> Any:
    import torch

    shape = (len(engram.layer_numbers), length, sequences, engram.memory_dim)
    return torch.randn(shape, dtype=torch.float32).requires_grad_()


def test_every_mode_keeps_less() -> None:
    kept = run_ranks(_kept, 1)[0]
    all_but_projections = "core_attention,feed_forward,mhc,engram"
    everything = "attention,feed_forward,mhc,engram"
    assert kept["full"] < kept[everything] < kept[all_but_projections] < kept["mhc,engram"] < kept["mhc"] < kept["none"]
    for part in ("core_attention", "feed_forward", "engram"):
        assert kept[part] < kept["none"]
    assert kept["attention"] < kept["core_attention"]
    # Sinkhorn's iterations and the copies of four streams are most of a layer of this width.
    assert kept["mhc,engram"] < 0.5 * kept["none"]


def test_selective_recomputation_of_nothing_is_refused() -> None:
    config = small_run_config(overrides=["training.recompute=selective", "training.recompute_modules="])
    with pytest.raises(UsageError, match=r"training\.recompute_modules is empty"):
        config.validate()
