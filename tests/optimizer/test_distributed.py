"""The distributed optimizer against the one that every replica repeats: same updates, same norm, its state divided."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pytest
from ranks import run_ranks, slow_above_two

LR = 1e-2
SCALES = (1.0, 0.2, 0.6, 0.5, 1.0)


class Layout(NamedTuple):
    """`chunks`: models side by side on each rank, as an interleaved pipeline has them. `exact`: gradients are rounded
    before they are summed, so that the order in which replicas are added does not matter."""

    ranks: int
    tensor: int = 1
    expert: int = 1
    chunks: int = 1
    dtype: str = "float64"
    exact: bool = True

    def replicas(self, name: str) -> int:
        """Data replicas of a parameter."""
        return self.ranks // (self.expert if "local_experts" in name else self.tensor)


LAYOUTS = [
    Layout(1),
    Layout(2),
    Layout(2, dtype="float64", exact=False),
    Layout(2, dtype="float32", exact=False),
    Layout(2, dtype="bfloat16"),
    Layout(2, expert=2),
    Layout(2, chunks=2, expert=2),
    Layout(2, tensor=2),
    Layout(4),
    Layout(4, dtype="float32"),
    Layout(4, exact=False),
    Layout(4, dtype="bfloat16"),
    Layout(4, tensor=2),
    Layout(4, tensor=2, expert=2),
    Layout(4, expert=2, chunks=2),
    Layout(4, tensor=2, expert=4, dtype="bfloat16"),
]


# Multiples of this add up exactly: gradients here are below 2**10.
GRID = {"float64": 2.0**-30, "float32": 2.0**-12, "bfloat16": 2.0**-12}


@dataclass
class Trained:
    """What a rank has after each step, and its optimizer's state after the last, as numpy arrays by name."""

    tensor_rank: int
    norms_squared: list[float] = field(default_factory=list)
    gradients: list[Any] = field(default_factory=list)  # of the last step, in the order of the parameters
    weights: list[dict[str, Any]] = field(default_factory=list)
    state: dict[str, dict[str, Any]] = field(default_factory=dict)


def _train(layout: Layout, distributed: bool) -> Trained:
    import torch
    from megatron.core import parallel_state
    from small_gpt import accumulate_gradients, build_small_gpt, global_parameters, small_config

    from engram_megatron.optimizer.backbone import build_backbone_optimizer

    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    config = small_config(layout.dtype, tensor=layout.tensor, expert=layout.expert, distributed_optimizer=distributed)
    chunks = [build_small_gpt(config) for _ in range(layout.chunks)]
    with torch.no_grad():
        for number, chunk in enumerate(chunks):
            for parameter in chunk.parameters():
                parameter.mul_(1 + number)  # chunks with other weights
            if layout.exact:
                _round_before_summing(chunk, GRID[layout.dtype])
    optimizer = build_backbone_optimizer(chunks, config)
    trained = Trained(parallel_state.get_tensor_model_parallel_rank())
    for step, scale in enumerate(SCALES):
        optimizer.zero_grad()
        for chunk in chunks:
            accumulate_gradients(chunk, step)
        optimizer.prepare_gradients()
        trained.norms_squared.append(optimizer.gradient_norm_squared())
        whole = optimizer.whole_gradients()
        trained.gradients = [whole[p].numpy().copy() for chunk in chunks for p in chunk.parameters()]
        optimizer.step(LR, scale)
        trained.weights.append(
            {
                f"chunk{number}.module.{name}": parameter.detach().double().numpy().copy()
                for number, chunk in enumerate(chunks)
                for name, parameter in global_parameters(chunk)
            }
        )
    state = optimizer.state_dict()["state"]
    trained.state = {name: {key: t.numpy().copy() for key, t in of.items()} for name, of in state.items()}
    return trained


def _round_before_summing(chunk: Any, grid: float) -> None:
    reduce = chunk.finish_grad_sync

    def round_and_reduce(**kwargs: Any) -> None:
        for buffer in chunk.buffers + chunk.expert_parallel_buffers:
            assert float(buffer.grad_data.abs().max()) < 2**10
            buffer.grad_data.copy_((buffer.grad_data / grid).round() * grid)
        reduce(**kwargs)

    chunk.finish_grad_sync = round_and_reduce


def _both(rank: int, world_size: int) -> dict[Layout, tuple[Trained, Trained]]:
    return {
        layout: (_train(layout, distributed=False), _train(layout, distributed=True))
        for layout in LAYOUTS
        if layout.ranks == world_size
    }


@cache
def _run_all(world_size: int) -> list[dict[Layout, tuple[Trained, Trained]]]:
    return run_ranks(_both, world_size)


def _runs(layout: Layout) -> list[tuple[Trained, Trained]]:
    """(replicated, distributed) of each rank."""
    return [of_rank[layout] for of_rank in _run_all(layout.ranks)]


@pytest.mark.parametrize("layout", slow_above_two(LAYOUTS), ids=str)
def test_updates_are_those_of_the_replicated_optimizer(layout: Layout) -> None:
    # Bit for bit where sums do not depend on the order: rounded gradients, or two replicas. Else gloo's reduce-scatter
    # adds replicas in another order than its all-reduce: 1e-16 of a gradient, which Adam's first step, |g| / |g|, and
    # five Newton-Schulz steps (485 times, see test_muon) can enlarge.
    tolerance = 0.0 if layout.exact or layout.ranks == 2 else 1e-12
    for replicated, distributed in _runs(layout):
        for step, (expected, weights) in enumerate(zip(replicated.weights, distributed.weights, strict=True)):
            assert weights.keys() == expected.keys()
            for name, weight in weights.items():
                scale = np.abs(expected[name]).max()
                np.testing.assert_allclose(
                    weight, expected[name], rtol=0, atol=tolerance * scale, err_msg=f"step {step} {name}"
                )
        # A sum of squares in float64 in another order.
        np.testing.assert_allclose(distributed.norms_squared, replicated.norms_squared, rtol=1e-13)
        assert len(set(distributed.norms_squared)) == len(SCALES)


@pytest.mark.parametrize("layout", slow_above_two([layout for layout in LAYOUTS if layout.exact]), ids=str)
def test_gradients_put_together_from_their_owners_are_the_replicated_ones(layout: Layout) -> None:
    for replicated, distributed in _runs(layout):
        for expected, gradient in zip(replicated.gradients, distributed.gradients, strict=True):
            np.testing.assert_array_equal(gradient, expected, strict=True)


@pytest.mark.parametrize("layout", slow_above_two(LAYOUTS), ids=str)
def test_replicas_hold_the_same_weights_bit_for_bit(layout: Layout) -> None:
    ranks = [distributed for _, distributed in _runs(layout)]
    for step in range(len(SCALES)):
        seen: dict[tuple[str, int], Any] = {}
        for rank in ranks:
            for name, weight in rank.weights[step].items():  # experts by their global number
                tensor_rank = 0 if "local_experts" in name else rank.tensor_rank
                np.testing.assert_array_equal(seen.setdefault((name, tensor_rank), weight), weight, err_msg=name)


def _rows(name: str) -> tuple[str, slice]:
    """("a", rows 2 to 5) of "a[2:5]"; all rows of a name without."""
    if not name.endswith("]"):
        return name, slice(None)
    bare, rows = name[:-1].split("[")
    first, end = rows.split(":")
    return bare, slice(int(first), int(end))


@pytest.mark.parametrize("layout", slow_above_two(LAYOUTS), ids=str)
def test_each_replica_holds_its_share_of_the_state_and_no_other(layout: Layout) -> None:
    """What all replicas of a parameter hold together is what one replica of the replicated optimizer holds, once."""
    runs = _runs(layout)
    bytes_of_rank = []
    for rank, (replicated, distributed) in enumerate(runs):
        bytes_of_rank.append(sum(values.nbytes for of in distributed.state.values() for values in of.values()))
        for name, of in distributed.state.items():
            bare, rows = _rows(name)
            assert of.keys() == replicated.state[bare].keys(), name
            assert ("master" in of) == (layout.dtype == "bfloat16")
            for key, values in of.items():
                if layout.exact or layout.ranks == 2:
                    np.testing.assert_array_equal(values, replicated.state[bare][key][rows], err_msg=f"{rank} {name}")
    stored = sum(
        values.nbytes / layout.replicas(name)
        for replicated, _ in runs
        for name, of in replicated.state.items()
        for values in of.values()
    )
    assert sum(bytes_of_rank) == round(stored)
    # Twenty matrices and a few hundred rows dealt over at most four replicas: far from perfect, far from replicated.
    assert max(bytes_of_rank) < 1.35 * stored / layout.ranks


def test_rows_of_the_vocabulary_are_shared() -> None:
    (whole, _), *_ = _runs(Layout(1))
    assert all("[" not in name for name in whole.state)
    for layout in (Layout(4), Layout(4, tensor=2)):
        shares = {name for _, distributed in _runs(layout) for name in distributed.state if "[" in name}
        assert {_rows(name)[0] for name in shares} == {
            "chunk0.module.embedding.word_embeddings.weight",
            "chunk0.module.output_layer.weight",
        }
        assert len(shares) == 2 * layout.ranks // layout.tensor
