"""The whole model in bfloat16, the dtype of the real presets: close to float32, and resumed bit for bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from small_run import build_small_run, global_batch, microbatches, small_run_config
from tiny_run import Start, backbone, run_starts, tables, tiny_config, train_losses


def _losses(rank: int, world_size: int, dtype: Any) -> tuple[list[float], set[str]]:
    config = small_run_config("float32")
    config = replace(config, training=replace(config.training, dtype=dtype))
    run = build_small_run(config, rank, world_size)
    losses = []
    for step in range(4):
        batches = microbatches(global_batch(step), rank, world_size)
        losses.append(run.trainer.train_step(step, batches, stop_requested=False).loss)
    mappings = {str(p.dtype) for name, p in run.chunks[0].named_parameters() if ".mhc_" in name}
    return losses, mappings


def test_bfloat16_loss_is_near_float32_and_hyper_connections_stay_float32() -> None:
    bfloat16, mappings = run_ranks(_losses, 1, "bfloat16")[0]
    float32, _ = run_ranks(_losses, 1, "float32")[0]
    assert mappings == {"torch.float32"}
    # 8 bits of mantissa: products are off by 2^-9 each, losses near 5.3 by a hundredth or so, not by a tenth.
    assert bfloat16 == pytest.approx(float32, abs=0.05)
    assert bfloat16 != float32


def test_bfloat16_run_resumes_bit_for_bit(tiny_corpus: Path, tmp_path: Path) -> None:
    straight, broken = (
        tiny_config(tiny_corpus, tmp_path / name, "training.dtype=bfloat16", "training.num_steps=4")
        for name in ("straight", "broken")
    )
    run_starts([Start(straight), Start(broken, stop_after=2), Start(broken, resume=True)])
    assert train_losses(tmp_path / "broken") == train_losses(tmp_path / "straight")
    checkpoints = [tmp_path / name / "checkpoints/step_00000004" for name in ("straight", "broken")]
    expected, found = (backbone(path) for path in checkpoints)
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    expected_rows, found_rows = (tables(path) for path in checkpoints)
    assert (expected_rows["weight"] == found_rows["weight"]).all()
