"""Every switch of the model builds, trains, and changes what it names."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
from ranks import run_ranks
from small_run import LENGTH, build_small_run, global_batch, microbatches, numbers, small_run_config

STEPS = 8
FAST = ("optimizer.learning_rate=1e-2", "optimizer.warmup_steps=0", "optimizer.clip_grad_norm=1.0")
SWITCHES = (
    "engram.gate=true",  # the model as it is
    "engram.conv=false",
    "engram.gate=false",
    "engram.compression=false",
    "engram.multi_branch=false",
    "engram.bias=true",
    "engram.cut_at_documents=false",
    "engram=none",
    "model.mhc.num_streams=1",
    "model.mhc.init=zero_bias",
    "model.moe=none",
    "model.attention.query_lora_rank=16",
    "model.attention.rope=yarn",
    "data.separate_documents=false",
)


def _losses(rank: int, world_size: int) -> dict[str, list[float]]:
    """Loss of each of `STEPS` steps on one repeated batch, from the initial weights, by switch."""
    losses = {}
    for switch in SWITCHES:
        config = small_run_config(overrides=[*FAST, switch])
        run = build_small_run(config, rank, world_size, rough=False)
        batch = global_batch(0, separate_documents=config.data.separate_documents)
        batches = microbatches(batch, rank, world_size)
        steps = range(STEPS)
        losses[switch] = [run.trainer.train_step(step, batches, stop_requested=False).loss for step in steps]
    return losses


@cache
def _trained() -> dict[str, list[float]]:
    return run_ranks(_losses, 1)[0]


@pytest.mark.parametrize("switch", SWITCHES)
def test_the_loss_on_a_repeated_batch_falls(switch: str) -> None:
    losses = _trained()[switch]
    # About 5.3 = ln(200) at the start. Eight steps cannot learn 168 tokens by heart, but must get well on the way.
    assert losses[-1] < losses[0] - 0.5, losses
    assert min(losses) > 0


@pytest.mark.parametrize("switch", [s for s in SWITCHES[1:] if s != "engram.compression=false"])
def test_a_switch_changes_the_run(switch: str) -> None:
    """All but compression, which the hasher's vocabulary projection decides before the model is built."""
    assert _trained()[switch] != _trained()[SWITCHES[0]]


def _logits(rank: int, world_size: int) -> dict[str, np.ndarray[Any, Any]]:
    """Of the first microbatch, with rough weights: random rows, zeroed rows, zeroed rows with biases, no Engram."""
    import torch

    from engram_megatron.training.forward_step import make_microbatch

    logits = {}
    variants = {"rows": (), "zero rows": (), "zero rows, bias": ("engram.bias=true",), "none": ("engram=none",)}
    for name, changes in variants.items():
        run = build_small_run(small_run_config(overrides=changes), rank, world_size)
        batches = microbatches(global_batch(0), rank, world_size)
        memory_LTBE = None
        if run.memory is not None:
            if name != "rows":
                run.memory.shard.rows.weight[:] = 0
            rows = run.memory.plan(batches)
            run.memory.fetch(rows)
            memory_LTBE = run.memory.of_microbatch(rows, 0)
        m = make_microbatch(batches[0], memory_LTBE, separate_documents=True, cut_memory_at_documents=True)
        with torch.no_grad():
            out = run.chunks[0](m.tokens_BT, m.document_ids_BT, m.memory_LTBE, m.memory_document_ids_BT)
        assert out.shape[1] == LENGTH
        logits[name] = numbers(out)
    return logits


def test_zeroed_tables_are_no_memory_at_all() -> None:
    """Without biases a zero row has a zero value: the gate has nothing to let through, the convolution nothing to
    spread. So the same weights with and without Engram compute the same, bit by bit."""
    logits = run_ranks(_logits, 1)[0]
    np.testing.assert_array_equal(logits["zero rows"], logits["none"])
    assert np.abs(logits["rows"] - logits["none"]).max() > 0.1
    assert np.abs(logits["zero rows, bias"] - logits["none"]).max() > 0.1
