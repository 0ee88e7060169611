"""A Hugging Face folder as a checkpoint that a run starts from (`checkpoint.init_from`), with bounded memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engram_checkpoints.backbone_writer import PIECE_BYTES, BackboneWriter
from engram_checkpoints.huggingface.folder_config import MODEL_TYPE, from_folder_config
from engram_checkpoints.huggingface.folder_hash import folder_hasher
from engram_checkpoints.huggingface.names import (
    TOKEN_MAP,
    NamedTensor,
    TableSlice,
    backbone_tensors,
    dtype_of,
    table_slices,
)
from engram_checkpoints.huggingface.safetensors_file import SafetensorsFolder
from engram_checkpoints.offline_writer import OfflineWriter
from engram_checkpoints.table_format import TableDescription
from engram_checkpoints.tensor_source import TensorInfo, row_pieces
from engram_checkpoints.train_state import TrainState
from engram_kernels.row_state import RowState, zero_rows
from engram_megatron.config import RunConfig
from engram_megatron.errors import UsageError
from engram_megatron.hashing.ngram_hasher import NgramHasher, identity_difference
from engram_megatron.overrides import apply_overrides, to_dict

_WEIGHT_DTYPE = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True)
class ImportSummary:
    """`config`: what a run must be given to train on; `left_out`: tensors that were not imported."""

    config: RunConfig
    left_out: list[str]


def import_folder(
    folder: Path,
    target: Path,
    base: RunConfig,
    overrides: Sequence[str],
    *,
    tokenizer: Path | None,
) -> ImportSummary:
    """Write the weights in `folder`, an export or a DeepSeek-V3-style model, to the new checkpoint `target`.

    The model is the one that config.json describes; all else is `base`'s, then `overrides`. There is no optimizer
    state: a run takes the weights alone. `tokenizer`: a tokenizer.json; None: the folder's.

    Raises:
        UsageError: `target` is there, or the folder is incomplete, damaged, of another tokenizer, or holds a model or a
            type of numbers that this project does not have.
    """
    values = _read_config(folder)
    config = apply_overrides(from_folder_config(values, base), overrides)
    config.validate()
    source = SafetensorsFolder(folder)
    tokenizer_json = folder / "tokenizer.json" if tokenizer is None else tokenizer
    tokenizer_sha256 = _sha256(tokenizer_json)
    hasher = folder_hasher(config, tokenizer_json)
    tables = [] if hasher is None else table_slices(config, hasher)
    if hasher is not None:
        _check_hash(values, hasher, source, tokenizer_json)
    backbone = list(backbone_tensors(config))
    left_out = _check_tensors(source, backbone, tables, values)
    writer = OfflineWriter(target)
    for tensor in backbone:
        _copy(writer.backbone, tensor, source, dtype_of(tensor, _WEIGHT_DTYPE[config.training.dtype]))
    if hasher is not None:
        description = _description(config, hasher)
        rows = _TableRows(source, tables, description)
        writer.write_tables(description, np.empty(0), rows)
    state = TrainState(
        step=0,
        tokens_seen=0,
        world_size=1,
        corpus_fingerprint="",
        tokenizer_sha256=tokenizer_sha256,
        hash_identity=None if hasher is None else hasher.identity(),
        config=to_dict(config),
    )
    writer.finish(state, num_steps=0)
    return ImportSummary(config, left_out)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read ({error}); give the folder of a Hugging Face model") from error
    if not isinstance(values, dict):
        raise UsageError(f"{path} is no configuration of a model; give the folder of a Hugging Face model")
    return values


def _sha256(tokenizer_json: Path) -> str:
    try:
        return hashlib.sha256(tokenizer_json.read_bytes()).hexdigest()
    except OSError as error:
        raise UsageError(
            f"{tokenizer_json} cannot be read; give the model's: --tokenizer PATH/tokenizer.json"
        ) from error


def _check_hash(values: dict[str, Any], hasher: NgramHasher, source: SafetensorsFolder, tokenizer_json: Path) -> None:
    """Raise `UsageError` where the rows mean other n-grams under this tokenizer than they did at the export."""
    difference = identity_difference(values.get("engram_hash_identity") or {}, hasher.identity())
    if difference:
        raise UsageError(f"config.json and {tokenizer_json} do not belong together: {difference}")
    if TOKEN_MAP not in source.tensors:
        raise UsageError(f"{source.folder} has no tensor {TOKEN_MAP}; export the model again")
    if not np.array_equal(source.read(TOKEN_MAP).numpy(), hasher.projection.lookup):
        raise UsageError(
            f"{source.folder}: {TOKEN_MAP} is not the map of {tokenizer_json}; give the tokenizer of the export"
        )


def _check_tensors(
    source: SafetensorsFolder, backbone: list[NamedTensor], tables: list[TableSlice], values: dict[str, Any]
) -> list[str]:
    """Raise `UsageError` for the first tensor that is missing, of another shape or not known; those left out."""
    wanted: dict[str, tuple[int, ...]] = {tensor.theirs: tensor.shape for tensor in backbone}
    wanted |= {table.theirs: table.shape for table in tables}
    for name, shape in wanted.items():
        if name not in source.tensors:
            raise UsageError(f"{source.folder} has no tensor {name}, which this model has with shape {shape}")
        if source.tensors[name].shape != shape:
            raise UsageError(
                f"{source.folder}: {name} has shape {source.tensors[name].shape}, config.json says {shape}"
            )
    rest = sorted(source.tensors.keys() - wanted.keys() - {TOKEN_MAP})
    prediction = f"model.layers.{values['num_hidden_layers']}."
    left_out = [name for name in rest if values["model_type"] != MODEL_TYPE and name.startswith(prediction)]
    unknown = [name for name in rest if name not in left_out and not name.endswith("rotary_emb.inv_freq")]
    if unknown:
        raise UsageError(f"{source.folder} has {unknown[0]} and {len(unknown) - 1} more tensors that this model lacks")
    return left_out


def _copy(writer: BackboneWriter, tensor: NamedTensor, source: SafetensorsFolder, dtype: torch.dtype) -> None:
    info = TensorInfo(tensor.shape, dtype)
    if tensor.roll is not None:
        writer.add_rows(tensor.ours, info, slice(None), tensor.to_ours(source.read(tensor.theirs)).to(dtype))
        return
    for rows in row_pieces(info, PIECE_BYTES):
        writer.add_rows(tensor.ours, info, rows, source.read(tensor.theirs, rows).to(dtype))


def _description(config: RunConfig, hasher: NgramHasher) -> TableDescription:
    assert config.engram is not None
    return TableDescription(
        total_rows=hasher.total_rows,
        row_dim=config.engram.row_dim,
        block_rows=config.tables.block_rows,
        dtype="float64" if config.tables.dtype == "float64" else "float32",
        step_count=0,
        update=config.tables.update,
        catch_up=None,
        initial=None,
    )


@dataclass(frozen=True, eq=False)
class _TableRows:
    """Rows of the joined table from the layers' tensors, with fresh moments."""

    source: SafetensorsFolder
    tables: list[TableSlice]
    description: TableDescription

    def __call__(self, start: int, stop: int) -> RowState:
        """Rows start .. stop - 1, which may be of several layers."""
        description = self.description
        rows = zero_rows(stop - start, description.row_dim, description.dtype, description.num_moments)
        for table in self.tables:
            first, end = max(start, table.first_row), min(stop, table.first_row + table.shape[0])
            if first < end:
                within = slice(first - table.first_row, end - table.first_row)
                values = self.source.read(table.theirs, within).to(getattr(torch, description.dtype))
                rows.weight[first - start : end - start] = values.numpy()
        return rows
