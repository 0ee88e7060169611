"""Checkpoints of runs on two tensor, context or pipeline ranks: a broken-off run goes on bit for bit, and another
layout can start from the weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_run import Start, backbone, metrics, run_starts, tables, tiny_config, train_losses

LAST = "checkpoints/step_00000004"


LAYOUTS = {
    "tensor": (["parallel.tensor=2", "parallel.expert=2"], []),
    "context": (["parallel.context=2", "parallel.expert=2"], []),
    "interleaved pipeline, two embeddings": (
        ["parallel.pipeline=2", "parallel.virtual_pipeline=2"],
        ["model.mtp.num_layers=1", "model.num_layers=4"],
    ),
    "pipeline of unequal stages, distributed optimizer": (
        ["parallel.pipeline=2", "parallel.pipeline_layout=Et*3|tmL", "parallel.distributed_optimizer=true"],
        ["model.mtp.num_layers=1", "model.num_layers=4"],
    ),
}


@pytest.fixture(scope="module", params=LAYOUTS)
def runs(
    request: pytest.FixtureRequest, tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[Any]]:
    """Four steps at once in `straight`; two, then two more in `broken`; `whole` starts on two data replicas from the
    weights of `straight`. Returns (folder, summaries of rank 0)."""
    folder = tmp_path_factory.mktemp("runs")
    common = ("training.num_steps=4", "checkpoint.every_steps=0")
    layout, model = LAYOUTS[request.param]
    # bfloat16 keeps master weights, which are divided as the weights are.
    common = (*common, *model, "training.dtype=bfloat16")
    divided = (*common, "parallel.expert=1", *layout)
    straight, broken = (tiny_config(tiny_corpus, folder / name, *divided) for name in ("straight", "broken"))
    init = f"checkpoint.init_from={folder / 'straight' / LAST}"
    whole = tiny_config(tiny_corpus, folder / "whole", *common, "parallel.expert=1", init)
    starts = [Start(straight), Start(broken, stop_after=2), Start(broken, resume=True), Start(whole, stop_after=0)]
    return folder, run_starts(starts)[0]


def test_broken_run_goes_on_bit_for_bit(runs: tuple[Path, list[Any]]) -> None:
    folder, (straight, stopped, resumed, _) = runs
    assert (straight.step, stopped.step, resumed.step) == (4, 2, 4)
    assert train_losses(folder / "broken") == train_losses(folder / "straight")
    assert len(set(train_losses(folder / "straight").values())) == 4
    assert resumed.last_validation_loss == straight.last_validation_loss
    expected, found = (backbone(folder / name / LAST) for name in ("straight", "broken"))
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    rows, resumed_rows = (tables(folder / name / LAST) for name in ("straight", "broken"))
    for name in ("weight", "exp_avg", "exp_avg_sq", "last_step"):
        np.testing.assert_array_equal(resumed_rows[name], rows[name], strict=True)


def test_stored_tensors_are_those_of_an_undivided_run(runs: tuple[Path, list[Any]]) -> None:
    folder, _ = runs
    divided, whole = (backbone(folder / name) for name in (f"straight/{LAST}", "whole/checkpoints/step_00000000"))
    assert {name: tensor.shape for name, tensor in divided.items()} == {n: t.shape for n, t in whole.items()}
    weights = [name for name in whole if not name.startswith("optimizer.") and name != "num_steps"]
    assert len(weights) > 20
    assert [name for name in weights if not torch.equal(divided[name], whole[name])] == []


def test_another_layout_starts_from_the_weights(runs: tuple[Path, list[Any]]) -> None:
    _, (straight, _, _, whole) = runs
    # The same model: a mean over 250 tokens of losses near 7, each of which bfloat16 rounds by less than 1 %.
    assert whole.first_validation_loss == pytest.approx(straight.last_validation_loss, rel=2e-3)
    assert abs(straight.first_validation_loss - straight.last_validation_loss) > 0.02


def test_tokens_and_rows_are_counted_once_per_replica(runs: tuple[Path, list[Any]], tiny_corpus: Path) -> None:
    folder, (straight, *_) = runs
    config = tiny_config(tiny_corpus, folder / "straight")
    positions = config.training.global_batch_size * config.data.sequence_length
    assert 0.9 * 4 * positions < straight.tokens_seen <= 4 * positions
    assert config.engram is not None
    line = next(line for line in metrics(folder / "straight") if "gather/lookups" in line)
    assert line["gather/lookups"] == positions * config.engram.num_heads
