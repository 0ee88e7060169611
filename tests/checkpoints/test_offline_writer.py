"""A checkpoint written by one process, piece by piece, is one that a run reads."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from saved_tables import save_tables

from engram_checkpoints import backbone_writer
from engram_checkpoints.backbone_reader import BackboneReader
from engram_checkpoints.checkpoint_files import FileSums, damages, read_manifest
from engram_checkpoints.offline_writer import OfflineWriter
from engram_checkpoints.table_reader import TableReader
from engram_checkpoints.train_state import TrainState
from engram_kernels.catch_up import CatchUp
from engram_megatron.errors import UsageError
from engram_megatron.optimizer.row_adam import RowAdam
from engram_megatron.tables.row_layout import RowLayout
from engram_megatron.tables.table_shard import TableShard

STATE = TrainState(
    step=2,
    tokens_seen=64,
    world_size=2,
    corpus_fingerprint="",
    tokenizer_sha256="",
    hash_identity=None,
    config={},
)


def _save(rank: int, world_size: int, folder: Path) -> None:
    from small_gpt import build_small_gpt, small_config, train_steps

    from engram_checkpoints.backbone import save_backbone
    from engram_megatron.optimizer.backbone import build_backbone_optimizer

    config = small_config("bfloat16", tensor=2, expert=2)
    model = build_small_gpt(config)
    optimizer = build_backbone_optimizer([model], config)
    train_steps(model, optimizer, 0, 2, 1e-2)
    save_backbone(folder, [model], optimizer, FileSums(folder))


def _load(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    from small_gpt import build_small_gpt, small_config

    from engram_checkpoints.backbone import load_backbone
    from engram_megatron.optimizer.backbone import build_backbone_optimizer

    config = small_config("bfloat16")
    model = build_small_gpt(config)
    optimizer = build_backbone_optimizer([model], config)
    load_backbone(folder, [model], optimizer)
    assert optimizer.num_steps == 2
    masters = {name: state["master"].numpy() for name, state in optimizer.state_dict()["state"].items()}
    return {"masters": masters, "digest": [float(p.double().sum()) for p in model.parameters()]}


def test_copy_of_a_backbone_holds_the_same_and_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_ranks(_save, 2, tmp_path / "saved")
    source = BackboneReader(tmp_path / "saved")
    assert source.num_steps == 2
    monkeypatch.setattr(backbone_writer, "FILE_BYTES", 20_000)
    monkeypatch.setattr(backbone_writer, "PIECE_BYTES", 1_000)
    writer = OfflineWriter(tmp_path / "copy")
    for name in source.tensors:
        writer.backbone.add(name, source)
    writer.finish(STATE, source.num_steps)
    copy = BackboneReader(tmp_path / "copy/backbone")
    assert copy.tensors == source.tensors
    assert len(os.listdir(tmp_path / "copy/backbone")) > 4
    for name in source.tensors:
        assert torch.equal(copy.read(name), source.read(name)), name
    wide = next(name for name, info in source.tensors.items() if len(info.shape) == 2)
    assert torch.equal(copy.read(wide, slice(3, 7)), source.read(wide)[3:7])
    ours, theirs = (run_ranks(_load, 1, folder)[0] for folder in (tmp_path / "copy/backbone", tmp_path / "saved"))
    assert ours["digest"] == theirs["digest"]
    for name, master in theirs["masters"].items():
        assert (ours["masters"][name] == master).all(), name


def test_copy_of_tables_in_other_blocks_holds_the_same(tmp_path: Path) -> None:
    adam = RowAdam(TableShard(RowLayout(100, 16, 1), 0, 4), CatchUp(0.9, 0.95, 1e-20))
    adam.shard.initialize(seed=3, std=1.0)
    source = TableReader(save_tables(tmp_path / "tables.zarr", adam))
    writer = OfflineWriter(tmp_path / "copy")
    writer.write_tables(source.description, source.learning_rates(), source.rows)
    writer.finish(STATE, 0)
    assert TrainState.read(tmp_path / "copy") == STATE
    copy = TableReader(tmp_path / "copy/tables.zarr")
    assert (copy.rows(0, 100).weight == adam.shard.rows.weight).all()


def test_nothing_counts_before_it_is_finished_and_every_flipped_byte_is_found(tmp_path: Path) -> None:
    writer = OfflineWriter(tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
    writer = OfflineWriter(tmp_path / "copy")  # after a try that was broken off
    writer.finish(STATE, 0)
    with pytest.raises(UsageError, match="exists already"):
        OfflineWriter(tmp_path / "copy")
    manifest = read_manifest(tmp_path / "copy")
    assert list(damages(tmp_path / "copy", manifest.items())) == []
    for path in manifest:
        file = tmp_path / "copy" / path
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
        (line,) = damages(tmp_path / "copy", [(path, manifest[path])])
        assert path in line
        assert "is damaged" in line
