"""Checkpoints of a distributed optimizer: the same files as a replicated one's, so either reads the other's."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from ranks import run_ranks
from tiny_run import backbone

from engram_checkpoints.checkpoint_files import FileSums

LR = 1e-2


class Layout(NamedTuple):
    ranks: int
    distributed: bool
    tensor: int = 1
    expert: int = 1


def _build(layout: Layout, dtype: str) -> tuple[Any, Any]:
    from megatron.core import parallel_state
    from small_gpt import build_small_gpt, small_config

    from engram_megatron.optimizer.backbone import build_backbone_optimizer

    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    config = small_config(dtype, tensor=layout.tensor, expert=layout.expert, distributed_optimizer=layout.distributed)
    model = build_small_gpt(config)
    return model, build_backbone_optimizer([model], config)


def _everything(model: Any, optimizer: Any) -> dict[str, np.ndarray[Any, Any]]:
    """All weights and optimizer state of this rank, in full precision."""
    tensors = {f"model.{name}": parameter for name, parameter in model.named_parameters()}
    for name, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{key}.{name}": tensor for key, tensor in state.items()}
    return {name: tensor.detach().double().numpy().copy() for name, tensor in tensors.items()}


def _train_and_save(rank: int, world_size: int, folder: Path, layout: Layout, dtype: str, more_steps: int) -> Any:
    """Two steps, save, then `more_steps`."""
    from small_gpt import train_steps

    from engram_checkpoints.backbone import save_backbone

    model, optimizer = _build(layout, dtype)
    train_steps(model, optimizer, 0, 2, LR)
    save_backbone(folder / "backbone", [model], optimizer, FileSums(folder / "backbone"))
    return train_steps(model, optimizer, 2, 2 + more_steps, LR), _everything(model, optimizer)


def _load_and_save(rank: int, world_size: int, folder: Path, copies: list[tuple[Layout, Path]], dtype: str) -> None:
    from engram_checkpoints.backbone import load_backbone, save_backbone

    for layout, copy in copies:
        model, optimizer = _build(layout, dtype)
        load_backbone(folder / "backbone", [model], optimizer)
        assert optimizer.num_steps == 2
        save_backbone(copy / "backbone", [model], optimizer, FileSums(copy / "backbone"))


def _load_and_train(rank: int, world_size: int, folder: Path, layout: Layout, dtype: str) -> Any:
    from small_gpt import train_steps

    from engram_checkpoints.backbone import load_backbone

    model, optimizer = _build(layout, dtype)
    load_backbone(folder / "backbone", [model], optimizer)
    return train_steps(model, optimizer, 2, 4, LR), _everything(model, optimizer)


LAYOUTS = [
    Layout(1, distributed=False),
    Layout(2, distributed=False),
    Layout(2, distributed=True),
    Layout(2, distributed=True, expert=2),
    Layout(4, distributed=True),
    Layout(4, distributed=True, tensor=2, expert=2),
    Layout(4, distributed=False, tensor=2),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    "source", [Layout(4, distributed=True, expert=2), Layout(2, distributed=True, tensor=2), Layout(2, False)], ids=str
)
def test_every_layout_reads_what_any_other_wrote_bit_for_bit(tmp_path: Path, source: Layout) -> None:
    """Loaded and saved again, all keys, whole shapes and values are those of the first checkpoint."""
    dtype = "bfloat16"
    run_ranks(_train_and_save, source.ranks, tmp_path, source, dtype, 0)
    expected = backbone(tmp_path)
    kinds = {name.split(".")[1] for name in expected if name.startswith("optimizer.")}
    assert kinds == {"momentum_buffer", "exp_avg", "exp_avg_sq", "master"}
    for ranks in (1, 2, 4):
        copies = [(layout, tmp_path / f"copy{i}") for i, layout in enumerate(LAYOUTS) if layout.ranks == ranks]
        run_ranks(_load_and_save, ranks, tmp_path, copies, dtype)
        for layout, copy in copies:
            found = backbone(copy)
            assert found.keys() == expected.keys()
            for name, tensor in expected.items():
                assert found[name].dtype == tensor.dtype
                assert torch.equal(found[name], tensor), f"{layout}: {name}"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "layout", [Layout(2, distributed=True), Layout(4, distributed=True, tensor=2, expert=2)], ids=str
)
def test_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path: Path, layout: Layout, dtype: str) -> None:
    uninterrupted = run_ranks(_train_and_save, layout.ranks, tmp_path, layout, dtype, 2)
    resumed = run_ranks(_load_and_train, layout.ranks, tmp_path, layout, dtype)
    for (numbers, tensors), (expected_numbers, expected) in zip(resumed, uninterrupted, strict=True):
        assert numbers == expected_numbers
        assert tensors.keys() == expected.keys()
        for name, tensor_ in tensors.items():
            np.testing.assert_array_equal(tensor_, expected[name], err_msg=name)


def _weights_alone(rank: int, world_size: int, folder: Path) -> tuple[bool, bool]:
    from engram_checkpoints.backbone import load_backbone_weights

    model, optimizer = _build(Layout(2, distributed=True), "bfloat16")
    load_backbone_weights(folder / "backbone", [model], optimizer)
    states = optimizer.state_dict()["state"]
    zero = all(not state[key].any() for state in states.values() for key in state if key != "master")
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer.load_state_dict(optimizer.state_dict())  # weights follow the masters: they must be the same
    return zero, all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


def test_weights_alone_give_each_owner_its_masters(tmp_path: Path) -> None:
    run_ranks(_train_and_save, 1, tmp_path, Layout(1, distributed=False), "bfloat16", 0)
    assert run_ranks(_weights_alone, 2, tmp_path) == [(True, True)] * 2
