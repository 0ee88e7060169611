"""Saving and loading the backbone: a resumed run is the uninterrupted one, bit for bit; what does not fit is told."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import run_ranks

from engram_checkpoints.checkpoint_files import FileSums

LR = 1e-2


def _build(dtype: str, tensor: int, expert: int) -> tuple[Any, Any]:
    from small_gpt import build_small_gpt, small_config

    from engram_megatron.optimizer.backbone import build_backbone_optimizer

    config = small_config(dtype, tensor=tensor, expert=expert)
    model = build_small_gpt(config)
    return model, build_backbone_optimizer([model], config)


def _everything(model: Any, optimizer: Any) -> dict[str, np.ndarray[Any, Any]]:
    """All weights, buffers and optimizer state of this rank, in full precision."""
    tensors = {f"model.{name}": tensor for name, tensor in model.module.state_dict().items() if tensor is not None}
    for name, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{key}.{name}": tensor for key, tensor in state.items()}
    return {name: tensor.detach().double().numpy().copy() for name, tensor in tensors.items()}


def _train_and_save(rank: int, world_size: int, folder: Path, dtype: str, tensor: int, expert: int) -> Any:
    from small_gpt import train_steps

    from engram_checkpoints.backbone import save_backbone

    model, optimizer = _build(dtype, tensor, expert)
    train_steps(model, optimizer, 0, 2, LR)
    save_backbone(folder, [model], optimizer, FileSums(folder))
    return train_steps(model, optimizer, 2, 4, LR), _everything(model, optimizer)


def _load_and_train(rank: int, world_size: int, folder: Path, dtype: str, tensor: int, expert: int) -> Any:
    from small_gpt import train_steps

    from engram_checkpoints.backbone import load_backbone

    model, optimizer = _build(dtype, tensor, expert)
    load_backbone(folder, [model], optimizer)
    return train_steps(model, optimizer, 2, 4, LR), _everything(model, optimizer)


@pytest.mark.parametrize(
    ("dtype", "world_size", "tensor", "expert"),
    [("bfloat16", 1, 1, 1), ("float32", 2, 1, 2), ("float32", 2, 2, 2)],
    ids=["one_rank_bfloat16", "expert", "tensor_expert"],
)
def test_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    tmp_path: Path, dtype: str, world_size: int, tensor: int, expert: int
) -> None:
    layout = (tmp_path / "backbone", dtype, tensor, expert)
    uninterrupted = run_ranks(_train_and_save, world_size, *layout)
    resumed = run_ranks(_load_and_train, world_size, *layout)
    for (numbers, tensors), (expected_numbers, expected) in zip(resumed, uninterrupted, strict=True):
        assert numbers == expected_numbers
        assert tensors.keys() == expected.keys()
        assert any(name.endswith("expert_bias") for name in tensors)
        for name, tensor_ in tensors.items():
            np.testing.assert_array_equal(tensor_, expected[name], err_msg=name)


def test_other_layout_goes_on_from_the_same_state(tmp_path: Path) -> None:
    layout = (tmp_path / "backbone", "float64")
    expected = run_ranks(_train_and_save, 2, *layout, 1, 2)[0][0]
    # Another order of float64 sums; under tensor parallelism of float32 sums in megatron-core's cross entropy.
    for world_size, tensor, expert, tolerance in [(1, 1, 1, 1e-11), (2, 2, 1, 1e-5)]:
        numbers = run_ranks(_load_and_train, world_size, *layout, tensor, expert)[0][0]
        np.testing.assert_allclose(numbers, expected, rtol=tolerance)


def _load_weights_alone(rank: int, world_size: int, folder: Path) -> Any:
    from small_gpt import train_steps

    from engram_checkpoints.backbone import load_backbone_weights, save_backbone

    model, optimizer = _build("bfloat16", 1, 1)
    train_steps(model, optimizer, 0, 2, LR)
    save_backbone(folder, [model], optimizer, FileSums(folder))
    fresh, fresh_optimizer = _build("bfloat16", 1, 1)
    load_backbone_weights(folder, [fresh], fresh_optimizer)
    weights = zip(model.parameters(), fresh.parameters(), strict=True)
    same = all(torch.equal(saved, loaded) for saved, loaded in weights)
    states = fresh_optimizer.state_dict()["state"]
    zero = all(not state[key].any() for state in states.values() for key in state if key != "master")
    masters = all(
        torch.equal(states[f"chunk0.{name}"]["master"], parameter.float())
        for name, parameter in fresh.named_parameters()
    )
    return same, zero, masters, fresh_optimizer.state_dict()["num_steps"]


def test_weights_alone_start_a_fresh_optimizer(tmp_path: Path) -> None:
    assert run_ranks(_load_weights_alone, 1, tmp_path / "backbone") == [(True, True, True, 0)]


def _messages(rank: int, world_size: int, folder: Path) -> list[str]:
    """What loading into models that do not fit says, on two ranks with their own experts each."""
    from small_gpt import build_small_gpt, small_config

    from engram_checkpoints.backbone import load_backbone, load_backbone_weights, save_backbone
    from engram_megatron.errors import UsageError
    from engram_megatron.optimizer.backbone import build_backbone_optimizer

    config = small_config("float32", expert=2)
    assert config.model.moe is not None
    model = build_small_gpt(config)
    optimizer = build_backbone_optimizer([model], config)
    save_backbone(folder, [model], optimizer, FileSums(folder))
    before = _everything(model, optimizer)
    more_experts = replace(config, model=replace(config.model, moe=replace(config.model.moe, num_experts=8)))
    fewer_experts = replace(config, model=replace(config.model, moe=replace(config.model.moe, num_experts=2)))
    wider = replace(config, model=replace(config.model, dense_ffn_size=64))
    messages = []
    for other in (more_experts, fewer_experts, wider):
        for load in (load_backbone, load_backbone_weights):
            chunk = build_small_gpt(other)
            with pytest.raises(UsageError) as error:
                load(folder, [chunk], build_backbone_optimizer([chunk], other))
            messages.append(str(error.value))
    with pytest.raises(UsageError) as error:
        load_backbone(folder.parent / "nothing", [model], optimizer)
    messages.append(str(error.value))
    after = _everything(model, optimizer)
    assert all(np.array_equal(before[name], after[name]) for name in before)
    return messages


def test_what_does_not_fit_is_told_in_one_line_on_every_rank(tmp_path: Path) -> None:
    first, second = run_ranks(_messages, 2, tmp_path / "backbone")
    assert first == second
    assert all("\n" not in message for message in first)
    more, more_weights, fewer, fewer_weights, wider, wider_weights, nothing = first
    for message in (more, more_weights):
        # Four experts of eight are missing; the lowest rank holds experts 0 to 3 and misses none, only the router's
        # and the bias's shapes are other for it.
        assert "expert_bias has shape (4,), this model needs (8,)" in message
    for message in (fewer, fewer_weights):
        assert "expert_bias has shape (4,), this model needs (2,)" in message
    for message in (wider, wider_weights):
        assert "decoder.layers.0.mlp.linear_fc1.weight_v has shape (48, 32), this model needs (64, 32)" in message
    assert "nothing holds no backbone checkpoint" in nothing


def _other_depth(rank: int, world_size: int, folder: Path) -> list[str]:
    from small_gpt import build_small_gpt, small_config

    from engram_checkpoints.backbone import load_backbone, save_backbone
    from engram_megatron.errors import UsageError
    from engram_megatron.optimizer.backbone import build_backbone_optimizer

    config = small_config("float32")
    deep = replace(config, model=replace(config.model, num_layers=3))
    models = [(build_small_gpt(c), c) for c in (config, deep)]
    messages = []
    for (saved, saved_config), (other, other_config) in (models, models[::-1]):
        where = folder / str(saved_config.model.num_layers)
        save_backbone(where, [saved], build_backbone_optimizer([saved], saved_config), FileSums(where))
        with pytest.raises(UsageError) as error:
            load_backbone(where, [other], build_backbone_optimizer([other], other_config))
        messages.append(str(error.value))
    return messages


def test_missing_and_unused_tensors_are_named(tmp_path: Path) -> None:
    ((missing, unused),) = run_ranks(_other_depth, 1, tmp_path)
    assert "has no tensor decoder.layers.2." in missing
    assert "has decoder.layers.2." in unused
    assert "that this model lacks" in unused
