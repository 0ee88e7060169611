"""A checkpoint that goes out and comes back holds the same weights, bit for bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_case import checkpoint, export, save_variants, write_tokenizer
from ranks import run_ranks
from safetensors import safe_open
from safetensors.torch import save_file
from small_run import small_run_config

from engram_checkpoints.backbone_reader import BackboneReader
from engram_checkpoints.huggingface.import_folder import import_folder
from engram_checkpoints.huggingface.safetensors_file import SafetensorsFolder
from engram_checkpoints.table_reader import TableReader
from engram_checkpoints.train_state import TrainState
from engram_megatron.config import RunConfig
from engram_megatron.errors import UsageError
from engram_megatron.overrides import from_dict

VARIANTS = {"all": ("model.mtp.num_layers=1", "engram.bias=true")}
SMALL_FILES = 5_000  # bytes: the tables are larger than a file


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    write_tokenizer(folder / "tokenizer.json")
    run_ranks(save_variants, 1, folder, folder / "tokenizer.json", VARIANTS)
    return folder


@pytest.fixture(scope="module")
def exported(saved: Path) -> Path:
    return export(checkpoint(saved, "all"), saved / "out", saved / "tokenizer.json", shard_bytes=SMALL_FILES)


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    """A copy of the export to break."""
    return Path(shutil.copytree(exported, tmp_path / "folder"))


def _import(folder: Path, target: Path, *overrides: str, tokenizer: Path | None = None) -> RunConfig:
    return import_folder(folder, target, small_run_config("float32"), overrides, tokenizer=tokenizer).config


def _weights(path: Path) -> dict[str, Any]:
    """Everything that a run takes from a checkpoint, tables as of the last step."""
    backbone = BackboneReader(path / "backbone")
    weights = {name: backbone.read(name).numpy() for name in backbone.tensors if not name.startswith("optimizer.")}
    tables = TableReader(path / "tables.zarr")
    return weights | {"tables": tables.weights(0, tables.description.total_rows, tables.catch_up())}


def test_round_trip_is_bit_identical(saved: Path, exported: Path, tmp_path: Path) -> None:
    config = _import(exported, tmp_path / "back")
    before, after = _weights(checkpoint(saved, "all")), _weights(tmp_path / "back")
    assert before.keys() == after.keys()
    for name, weight in before.items():
        assert weight.dtype == after[name].dtype, name
        assert np.array_equal(weight, after[name]), name
    ours = from_dict(RunConfig, TrainState.read(checkpoint(saved, "all")).config)
    assert (config.model, config.engram) == (ours.model, ours.engram)
    assert TrainState.read(tmp_path / "back").hash_identity == TrainState.read(checkpoint(saved, "all")).hash_identity


def test_rows_of_a_table_are_those_that_its_layer_reads(saved: Path, exported: Path) -> None:
    """By the offsets of the hash alone, and by the library alone."""
    config = json.loads((exported / "config.json").read_text())
    joined = _weights(checkpoint(saved, "all"))["tables"]
    first = 0
    for layer, rows in zip(config["engram_layer_ids"], config["engram_num_embeddings"], strict=True):
        name = f"model.layers.{layer}.engram.embed.weight"
        file = json.loads((exported / "model.safetensors.index.json").read_text())["weight_map"][name]
        with safe_open(exported / file, framework="np") as opened:
            assert list(opened.keys()) == [name], "a table larger than a file has one of its own"
            assert np.array_equal(opened.get_tensor(name), joined[first : first + rows])
        first += rows
    assert first == len(joined)


def test_files_are_no_larger_than_asked_and_the_index_names_all(exported: Path) -> None:
    index = json.loads((exported / "model.safetensors.index.json").read_text())
    sizes = {}
    for file in set(index["weight_map"].values()):
        with safe_open(exported / file, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        assert {index["weight_map"][name] for name in tensors} == {file}
        sizes[file] = sum(tensor.nbytes for tensor in tensors.values())
        assert sizes[file] <= SMALL_FILES or len(tensors) == 1
    assert sum(sizes.values()) == index["metadata"]["total_size"]
    assert len(sizes) > 3


def test_names_and_order_are_those_of_deepseek(exported: Path, saved: Path) -> None:
    """wkv has the keys stream by stream, then the value; eh_proj the embedding's columns, then the hidden state's."""
    source, ours = SafetensorsFolder(exported), _weights(checkpoint(saved, "all"))
    width = 32
    wkv, key_value = source.read("model.layers.1.engram.wkv.weight"), ours["decoder.layers.1.engram.key_value.weight"]
    assert np.array_equal(wkv[-width:], key_value[:width])
    assert np.array_equal(wkv[:-width], key_value[width:])
    projection, theirs = ours["mtp.layers.0.projection.weight"], source.read("model.layers.3.eh_proj.weight")
    assert np.array_equal(theirs[:, :width], projection[:, width:])
    assert np.array_equal(theirs[:, width:], projection[:, :width])
    assert source.tensors["model.layers.1.hc_attn_fn"].shape == (24, 4 * width)
    assert source.tensors["model.layers.1.engram.q_weight"].shape == (4, width)
    assert np.array_equal(
        source.read("model.layers.2.mlp.experts.3.up_proj.weight"),
        ours["decoder.layers.2.mlp.experts.experts.3.linear_fc1.weight_v"],
    )


def _remove(folder: Path, name: str) -> None:
    _change(folder, name, lambda tensors: tensors.pop(name))


def _change(folder: Path, name: str, change: Any) -> None:
    """Rewrite the file that holds `name`, by the library."""
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    file = folder / index["weight_map"][name]
    with safe_open(file, framework="pt") as opened:
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    change(tensors)
    save_file(tensors, file)
    index["weight_map"] = {k: v for k, v in index["weight_map"].items() if v != file.name or k in tensors}
    index["weight_map"] |= dict.fromkeys(tensors, file.name)
    path.write_text(json.dumps(index))


def _set(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def _second_file(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[1]


GATE = "model.layers.1.mlp.gate.weight"
BROKEN: dict[str, tuple[Any, str]] = {
    "missing tensor": (lambda f: _remove(f, GATE), f"has no tensor {GATE}, which this model has with shape"),
    "wrong shape": (lambda f: _change(f, GATE, lambda t: t.update({GATE: torch.zeros(4, 31)})), r"shape \(4, 31\)"),
    "unknown tensor": (lambda f: _change(f, GATE, lambda t: t.update(more=torch.zeros(1))), "has more and 0 more"),
    "8-bit weights": (
        lambda f: _change(f, GATE, lambda t: t.update({GATE: torch.zeros(4, 32).to(torch.float8_e4m3fn)})),
        "is of type F8_E4M3",
    ),
    "lost file": (lambda f: _second_file(f).unlink(), r"model-00002-of-\d+.safetensors is missing"),
    "torn file": (lambda f: _second_file(f).write_bytes(b"12345678"), "is damaged"),
    "other tokenizer": (lambda f: write_tokenizer(f / "tokenizer.json", "a1"), "do not belong together: hash"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json cannot be read; give"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json cannot be read"),
    "other model": (lambda f: _set(f, model_type="llama"), "model_type 'llama'"),
    "field missing": (lambda f: _set(f, model_type="deepseek_v3", dtype="int8"), "has dtype 'int8'"),
    "quantized": (lambda f: _set(f, quantization_config={"quant_method": "fp8"}), "quantization_config = fp8"),
    "groups of experts": (lambda f: _set(f, n_group=4, topk_group=2), "n_group = 4, topk_group = 2"),
    "other sizes": (lambda f: _set(f, engram_vocab_size=211), "do not belong together: hash total_rows|primes"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_folder_is_refused_in_one_line(what: str, folder: Path, tmp_path: Path) -> None:
    break_it, message = BROKEN[what]
    break_it(folder)
    with pytest.raises(UsageError, match=message) as refusal:
        _import(folder, tmp_path / "back")
    assert "\n" not in str(refusal.value)
    assert list(tmp_path.iterdir()) == [folder], "something was written"


def test_refuses_what_cannot_be_exported(saved: Path, tmp_path: Path) -> None:
    source = checkpoint(saved, "all")
    with pytest.raises(UsageError, match="is not here; give its tokenizer with --tokenizer"):
        export(source, tmp_path / "out")
    with pytest.raises(UsageError, match="was trained with another tokenizer"):
        export(source, tmp_path / "out", write_tokenizer(tmp_path / "other.json", "a1"))
    with pytest.raises(UsageError, match="not a complete checkpoint"):
        export(saved, tmp_path / "out", saved / "tokenizer.json")
    (tmp_path / "there").mkdir()
    with pytest.raises(UsageError, match="exists already"):
        export(source, tmp_path / "there", saved / "tokenizer.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.json", "there"]
    with pytest.raises(UsageError, match="cannot be read"):
        _import(saved / "tokenizer.json", tmp_path / "back")
