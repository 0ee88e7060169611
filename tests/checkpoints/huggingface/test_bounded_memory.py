"""Export and import of tables larger than memory is allowed to be, by the programs themselves."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_case import write_tokenizer
from small_run import small_run_config

from engram_checkpoints.huggingface.folder_hash import folder_hasher
from engram_checkpoints.huggingface.names import backbone_tensors
from engram_checkpoints.offline_writer import OfflineWriter
from engram_checkpoints.table_format import TableDescription
from engram_checkpoints.tensor_source import TensorInfo
from engram_checkpoints.train_state import TrainState
from engram_data.tokenizer import CorpusTokenizer
from engram_kernels.row_state import RowState, zero_rows
from engram_megatron.overrides import to_dict

ROOT = Path(__file__).parents[3]
GIB = 1024**3
SHARD = GIB // 4
MEASURED = """
import resource, runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    assert not end.code, end.code
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""
OVERRIDES = (
    *("engram.num_heads_per_order=1", "engram.memory_dim=512", "engram.rows_per_head=700000"),
    "tables.block_rows=16384",
)


def _write_checkpoint(target: Path, tokenizer: Path) -> int:
    """Two tables of more than a GiB each, of rows that were never updated, which take no space; their bytes."""
    config = small_run_config("float32", OVERRIDES)
    hasher = folder_hasher(config, tokenizer)
    assert config.engram is not None
    assert hasher is not None
    writer = OfflineWriter(target)
    for tensor in backbone_tensors(config):
        zeros = torch.zeros(tensor.shape)
        writer.backbone.add_rows(tensor.ours, TensorInfo(tensor.shape, torch.float32), slice(None), zeros)
    description = TableDescription(
        total_rows=hasher.total_rows,
        row_dim=config.engram.row_dim,
        block_rows=config.tables.block_rows,
        dtype="float32",
        step_count=1,
        update="dense",
        catch_up={"beta1": 0.9, "beta2": 0.95, "eps": 1e-20},
        initial={"seed": 1, "std": 1.0},
    )

    def rows(start: int, stop: int) -> RowState:
        return zero_rows(stop - start, description.row_dim, np.float32)

    writer.write_tables(description, np.ones(1), rows)
    identity = CorpusTokenizer("toy", tokenizer.read_bytes()).identity
    state = TrainState(
        step=1,
        tokens_seen=0,
        world_size=1,
        corpus_fingerprint="",
        tokenizer_sha256=identity.sha256,
        hash_identity=hasher.identity(),
        config=to_dict(config),
    )
    writer.finish(state, num_steps=1)
    return hasher.total_rows * description.row_dim * 4


def _peak_bytes(program: str, *arguments: object) -> int:
    command = [sys.executable, "-c", MEASURED, str(ROOT / "launch" / program), *map(str, arguments)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert ended.returncode == 0, ended.stderr
    return int(ended.stdout.split()[-1])


@pytest.mark.slow
def test_peak_memory_is_a_file_and_a_gib(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path / "tokenizer.json")
    table_bytes = _write_checkpoint(tmp_path / "checkpoint", tokenizer)
    assert table_bytes > 2 * (SHARD + GIB)
    shard = ("--shard-gib", SHARD / GIB, "--tokenizer", tokenizer)
    peak = _peak_bytes("export_hf.py", tmp_path / "checkpoint", tmp_path / "out", *shard)
    print(f"export of {table_bytes / GIB:.2f} GiB of tables: peak {peak / GIB:.2f} GiB")
    assert peak < SHARD + GIB
    settings = ("engram_tiny", "tables.block_rows=16384")
    peak = _peak_bytes("import_hf.py", tmp_path / "out", tmp_path / "back", *settings)
    print(f"import: peak {peak / GIB:.2f} GiB")
    assert peak < SHARD + GIB
