"""A checkpoint as a Hugging Face folder: safetensors, config, tokenizer and the model's code, with bounded memory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engram_checkpoints.backbone_reader import BackboneReader
from engram_checkpoints.checkpoint_files import damages, read_manifest
from engram_checkpoints.huggingface.folder_config import to_folder_config
from engram_checkpoints.huggingface.folder_hash import folder_hasher
from engram_checkpoints.huggingface.names import (
    TOKEN_MAP,
    NamedTensor,
    TableSlice,
    backbone_tensors,
    dtype_of,
    table_slices,
)
from engram_checkpoints.huggingface.safetensors_file import Entry, write_folder
from engram_checkpoints.offline_writer import BACKBONE, TABLES
from engram_checkpoints.table_format import is_table_chunk
from engram_checkpoints.table_reader import TableReader
from engram_checkpoints.tensor_source import TensorInfo, row_pieces
from engram_checkpoints.train_state import TrainState
from engram_data.tokenizer import CorpusTokenizer, load_tokenizer
from engram_kernels.catch_up import CatchUp
from engram_kernels.split_float import round_to_bfloat16
from engram_megatron.config import RunConfig
from engram_megatron.errors import UsageError
from engram_megatron.hashing.ngram_hasher import NgramHasher, identity_difference
from engram_megatron.overrides import from_dict

PIECE_BYTES = 64 * 1024**2  # of a tensor in memory at a time
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_CODE = ("configuration_engram.py", "modeling_engram.py", "layers_engram.py", "memory_engram.py")


@dataclass(frozen=True, eq=False)
class _Source:
    """What an export reads."""

    config: RunConfig
    dtype: str
    tokenizer: CorpusTokenizer
    hasher: NgramHasher | None
    backbone: BackboneReader
    tables: TableReader | None


def export_checkpoint(
    checkpoint: Path,
    out: Path,
    *,
    tokenizer: Path | None,
    dtype: str | None,
    shard_bytes: int,
    on_file: Callable[[str], None],
) -> None:
    """Write `checkpoint` to the new folder `out`, which appears when it is complete.

    Args:
        tokenizer: a tokenizer.json; None: that of the run's corpus.
        dtype: of the weights, `bfloat16` or `float32`; None: the run's.
        shard_bytes: size of a file, see `write_folder`.

    Raises:
        UsageError: `out` is there, the checkpoint is damaged or float64, or the tokenizer is another.
    """
    if out.exists():
        raise UsageError(f"{out} exists already; choose another folder, or remove it first")
    source = _open(checkpoint, tokenizer, dtype)
    partial_out = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial_out, ignore_errors=True)
    partial_out.mkdir(parents=True)
    write_folder(partial_out, list(_entries(source)), shard_bytes, on_file)
    _write_small_files(partial_out, source)
    partial_out.rename(out)


def _open(checkpoint: Path, tokenizer_file: Path | None, dtype: str | None) -> _Source:
    """Open everything and check that it belongs together; nothing is written."""
    state = TrainState.read(checkpoint)
    config: RunConfig = from_dict(RunConfig, state.config)
    if dtype is None and config.training.dtype not in DTYPES:
        raise UsageError(f"{checkpoint} was trained in {config.training.dtype}; give --dtype float32 or bfloat16")
    tokenizer_path = tokenizer_file or Path(config.data.corpus) / "tokenizer.json"
    if tokenizer_file is None and not tokenizer_path.is_file():
        raise UsageError(
            f"the corpus {config.data.corpus} of {checkpoint} is not here; give its tokenizer with "
            "--tokenizer PATH/tokenizer.json"
        )
    tokenizer = load_tokenizer(str(tokenizer_path))
    if state.tokenizer_sha256 != tokenizer.identity.sha256:
        raise UsageError(
            f"{checkpoint} was trained with another tokenizer (sha256 {state.tokenizer_sha256[:12]}) than "
            f"{tokenizer_path} ({tokenizer.identity.sha256[:12]}); give the one of its corpus: --tokenizer PATH"
        )
    hasher = folder_hasher(config, tokenizer_path)
    if hasher is not None:
        difference = identity_difference(state.hash_identity or {}, hasher.identity())
        if difference:
            raise UsageError(f"{checkpoint} addresses its tables by another hash: {difference}")
    small = [(path, wanted) for path, wanted in read_manifest(checkpoint).items() if not is_table_chunk(path)]
    problem = next(damages(checkpoint, small), None)
    if problem is not None:
        raise UsageError(f"{problem}; use another checkpoint")
    tables = None if hasher is None else TableReader(checkpoint / TABLES)
    backbone = BackboneReader(checkpoint / BACKBONE)
    return _Source(config, dtype or config.training.dtype, tokenizer, hasher, backbone, tables)


def _entries(source: _Source) -> Iterator[Entry]:
    """All tensors in the order of their files: the backbone's, the token map, the tables."""
    dtype = DTYPES[source.dtype]
    for tensor in backbone_tensors(source.config):
        info = TensorInfo(tensor.shape, dtype_of(tensor, dtype))
        stored = source.backbone.tensors.get(tensor.ours)
        assert stored is not None, tensor.ours
        assert stored.shape == tensor.shape, (tensor.ours, stored.shape, tensor.shape)
        yield Entry(tensor.theirs, info, partial(_backbone_pieces, source.backbone, tensor, info.dtype))
    if source.hasher is None or source.tables is None:
        return
    lookup = torch.tensor(source.hasher.projection.lookup)
    yield Entry(TOKEN_MAP, TensorInfo(tuple(lookup.shape), lookup.dtype), lambda: [lookup])
    catch_up = source.tables.catch_up()
    for table in table_slices(source.config, source.hasher):
        pieces = partial(_table_pieces, source.tables, table, catch_up, dtype)
        yield Entry(table.theirs, TensorInfo(table.shape, dtype), pieces)


def _backbone_pieces(source: BackboneReader, tensor: NamedTensor, dtype: torch.dtype) -> Iterator[Tensor]:
    if tensor.roll is not None:
        yield tensor.to_theirs(source.read(tensor.ours)).to(dtype)
        return
    for rows in row_pieces(source.tensors[tensor.ours], PIECE_BYTES):
        yield source.read(tensor.ours, rows).to(dtype)


def _table_pieces(
    reader: TableReader, table: TableSlice, catch_up: CatchUp | None, dtype: torch.dtype
) -> Iterator[Tensor]:
    """Rows as of the last step, block by block; in bfloat16 those that a run with such tables reads."""
    for start, stop in reader.pieces(table.first_row, table.first_row + table.shape[0]):
        weights = reader.weights(start, stop, catch_up)
        if dtype is torch.bfloat16 and weights.dtype == "float32":
            yield torch.from_numpy(round_to_bfloat16(weights)).view(torch.bfloat16)
        else:
            yield torch.from_numpy(weights).to(dtype)


def _write_small_files(folder: Path, source: _Source) -> None:
    identity = source.tokenizer.identity
    eos = identity.eos_token_id
    _write_json(folder / "config.json", to_folder_config(source.config, source.hasher, source.dtype, eos))
    _write_json(folder / "generation_config.json", {"eos_token_id": eos, "pad_token_id": eos})
    (folder / "tokenizer.json").write_bytes(source.tokenizer.json_bytes)
    end = source.tokenizer.decode([eos])
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": end,
            "pad_token": end,
            "padding_side": "left",
            "clean_up_tokenization_spaces": False,
            "model_max_length": source.config.data.sequence_length,
        },
    )
    code = files("engram_checkpoints.huggingface.remote_code")
    for name in _CODE:
        (folder / name).write_text((code / name).read_text())


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n")
