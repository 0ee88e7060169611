"""Parts of stored tensors: the right numbers, and little more than them is read."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import run_ranks
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.state_dict_saver import save

from engram_checkpoints.piece_reader import PieceReader
from engram_megatron.layouts.matrix import Layout
from engram_megatron.layouts.small_model import small_model_config

NUMBERS = torch.arange(60 * 5000, dtype=torch.float32).view(60, 5000)
TENSORS = {
    "matrix": NUMBERS,
    "bfloat16": NUMBERS.bfloat16(),
    "vector": torch.arange(100_000),
    "cube": NUMBERS.view(30, 10, 1000),
    "transposed": NUMBERS.view(5000, 60).t(),
    "rows of a larger one": torch.arange(120 * 5000.0).view(120, 5000)[30:90],
}


class IntoTensor(LoadPlanner):
    """Takes what is read into `out`."""

    set_up_planner = create_local_plan = create_global_plan = finish_plan = load_bytes = None  # type: ignore

    def __init__(self, out: torch.Tensor) -> None:
        self._out = out

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        view = self._out
        for dimension, (offset, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            view = view.narrow(dimension, offset, length)
        return view

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("backbone")
    save(dict(TENSORS), storage_writer=FileSystemWriter(path), no_dist=True)
    return path


def bytes_read() -> int:
    """By this process so far, from whatever file."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line.removeprefix("rchar: ") for line in lines if line.startswith("rchar: ")))


def read(folder: Path, name: str, *spans: slice) -> tuple[torch.Tensor, int]:
    """Part `spans` of a tensor, and the bytes read for it once the index is known."""
    reader = PieceReader(folder)
    metadata = reader.read_metadata()
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    stored = metadata.state_dict_metadata[name]
    assert isinstance(stored, TensorStorageMetadata)
    whole = [slice(0, size) for size in stored.size[len(spans) :]]
    places = [(span.start, span.stop - span.start) for span in (*spans, *whole)]
    offsets, sizes = (torch.Size(values) for values in zip(*places, strict=True))
    out = torch.empty(sizes, dtype=stored.properties.dtype)
    items = create_read_items_for_chunk_list(name, stored, [ChunkStorageMetadata(offsets, sizes)])
    before = bytes_read()
    reader.read_data(LoadPlan(items), IntoTensor(out)).wait()
    return out, bytes_read() - before


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("rows", [slice(0, 60), slice(0, 1), slice(7, 20), slice(29, 30)])
def test_rows_are_those_of_the_tensor(folder: Path, name: str, rows: slice) -> None:
    rows = slice(rows.start, min(rows.stop, len(TENSORS[name])))
    out, _ = read(folder, name, rows)
    assert torch.equal(out, TENSORS[name][rows])


def test_columns_of_rows_are_those_of_the_tensor(folder: Path) -> None:
    for name in ("matrix", "transposed", "cube"):
        out, _ = read(folder, name, slice(3, 9), slice(5, 10))
        assert torch.equal(out, TENSORS[name][3:9, 5:10])


def test_only_the_rows_are_read(folder: Path) -> None:
    out, num_bytes = read(folder, "matrix", slice(10, 20))
    # What says where they lie is read too, through buffers of some KiB.
    assert out.nbytes <= num_bytes < out.nbytes + 100_000 < NUMBERS.nbytes / 3


def test_file_that_is_too_short_is_an_error(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (data,) = tmp_path.glob("*.distcp")
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    errors = 0
    for name in TENSORS:
        try:
            assert torch.equal(read(tmp_path, name, slice(25, 30))[0], TENSORS[name][25:30])
        except (EOFError, RuntimeError, zipfile.BadZipFile):
            errors += 1
    assert 0 < errors < len(TENSORS)


# Large enough that numbers outweigh what is said of them.
WIDE = (
    *("model.hidden_size=256", "model.vocab_size=4096", "model.dense_ffn_size=512", "model.moe.expert_ffn_size=128"),
    *("model.attention.kv_lora_rank=64", "engram.rows_per_head=20000", "tables.block_rows=512"),
)


def _train_rows_and_save(rank: int, world_size: int, config: Any, folder: Path) -> None:
    """One step of every row, so that all of them are stored."""
    from engram_megatron.layouts.rank_run import SmallRun
    from engram_megatron.layouts.resume_case import save as save_run
    from engram_megatron.tables.row_gradients import RowGradients

    run = SmallRun(config, rank, world_size)
    assert run.memory is not None
    shard = run.memory.shard
    noise = np.random.default_rng(rank).standard_normal((shard.num_rows, shard.row_dim), np.float32)
    run.memory.optimizer.step(RowGradients.summed(np.arange(shard.num_rows), [noise]), 1e-3)
    save_run(run, folder)


def _load(rank: int, world_size: int, config: Any, folder: Path) -> dict[str, tuple[int, int]]:
    """Of backbone and tables: bytes read, and bytes of what this rank holds of them."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    from engram_checkpoints.backbone import _sharded_state, load_backbone
    from engram_checkpoints.tables import load_shard
    from engram_megatron.layouts.rank_run import SmallRun

    run = SmallRun(config, rank, world_size)
    assert run.memory is not None
    state = _sharded_state(run.chunks, run.optimizer)
    apply_factories(state)
    backbone = sum(value.data.nbytes for value in nested_values(state) if isinstance(value, ShardedTensor))
    start = bytes_read()
    load_backbone(folder / "backbone", run.chunks, run.optimizer)
    between = bytes_read()
    load_shard(folder / "tables.zarr", run.memory.optimizer)
    shard = run.memory.shard
    rows = shard.num_rows * (3 * shard.row_dim + 1) * 4
    return {"backbone": (between - start, backbone), "tables": (bytes_read() - between, rows)}


def test_rank_reads_its_share_of_what_one_rank_wrote(tmp_path: Path) -> None:
    """TP2 x PP2: half of the layers, half of most matrices, a fourth of the rows."""
    one, four = Layout(1), Layout(4, tensor=2, pipeline=2)
    run_ranks(_train_rows_and_save, 1, small_model_config("float32", [*one.overrides(), *WIDE]), tmp_path)
    of_ranks = run_ranks(_load, 4, small_model_config("float32", [*four.overrides(), *WIDE]), tmp_path)
    for part, folder in (("backbone", "backbone"), ("tables", "tables.zarr")):
        whole = sum(path.stat().st_size for path in (tmp_path / folder).rglob("*") if path.is_file())
        for rank in of_ranks:
            num_bytes, share = rank[part]
            # Beside its share: the index, where each piece lies in its file, all columns of what is cut by columns.
            assert num_bytes < 1.4 * share, part
            assert num_bytes < whole / 2, part
