"""Which experts stay, under which names, with which rows of the router."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from engram_checkpoints.tensor_source import TensorInfo
from engram_megatron.errors import UsageError
from engram_megatron.upgrade.fewer_experts import FewerExperts, most_wanted, read_kept

LAYERS = ("decoder.layers.1", "mtp.layers.0.mtp_model_layer")
BIASES = {LAYERS[0]: [0.2, -0.1, 0.0, -0.3], LAYERS[1]: [0.0, 0.0, -0.1, 0.0]}


class Tensors:
    """A `TensorSource` of tensors in memory."""

    def __init__(self, values: dict[str, torch.Tensor]) -> None:
        self.values = values
        self.tensors = {name: TensorInfo(tuple(value.shape), value.dtype) for name, value in values.items()}

    def read(self, name: str, rows: slice = slice(None)) -> torch.Tensor:
        return self.values[name][rows].clone()


@pytest.fixture
def source() -> Tensors:
    values = {"embedding.word_embeddings.weight": torch.randn(8, 3)}
    for layer in LAYERS:
        values[f"{layer}.mlp.router.weight"] = torch.randn(4, 3)
        values[f"{layer}.mlp.router.expert_bias"] = torch.tensor(BIASES[layer])
        values[f"{layer}.mlp.shared_experts.linear_fc2.weight"] = torch.randn(3, 2)
        for expert in range(4):
            values[f"{layer}.mlp.experts.experts.{expert}.linear_fc2.weight"] = torch.randn(3, 2)
    return Tensors(values)


def test_experts_of_the_lowest_bias_stay_the_first_of_equal_ones(source: Tensors) -> None:
    assert most_wanted(source, 2) == {LAYERS[0]: (1, 3), LAYERS[1]: (0, 2)}


def test_kept_experts_keep_their_numbers_in_order_with_their_rows_of_the_router(source: Tensors) -> None:
    kept = {LAYERS[0]: (1, 3), LAYERS[1]: (0, 2)}
    fewer = FewerExperts(source, kept)
    found = {name: fewer.read(name) for name in fewer.tensors}
    expected = {name: value for name, value in source.values.items() if ".experts." not in name}
    for layer, experts in kept.items():
        for name in (f"{layer}.mlp.router.weight", f"{layer}.mlp.router.expert_bias"):
            expected[name] = torch.stack([source.values[name][expert] for expert in experts])
        for number, expert in enumerate(experts):
            expected[f"{layer}.mlp.experts.experts.{number}.linear_fc2.weight"] = source.values[
                f"{layer}.mlp.experts.experts.{expert}.linear_fc2.weight"
            ]
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
        assert fewer.tensors[name] == TensorInfo(tuple(value.shape), value.dtype)
        assert torch.equal(fewer.read(name, slice(1, 2)), value[1:2]), name


def test_experts_from_a_file(source: Tensors, tmp_path: Path) -> None:
    (tmp_path / "kept.json").write_text(json.dumps({LAYERS[0]: [3, 0], LAYERS[1]: [1, 2]}))
    assert read_kept(tmp_path / "kept.json", source, 2) == {LAYERS[0]: (0, 3), LAYERS[1]: (1, 2)}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "cannot be read as JSON"),
        ("[0, 1]", "must list the experts to keep of each of decoder.layers.1, mtp.layers.0.mtp_model_layer"),
        (json.dumps({LAYERS[0]: [0, 1]}), "must list the experts to keep of each of"),
        *(
            (json.dumps({LAYERS[0]: wrong, LAYERS[1]: [1, 2]}), "decoder.layers.1 must name 2 .* experts of 0..3")
            for wrong in ([0], [0, 1, 2], [0, 0], [0, 4], [-1, 0], [0, "1"], [0, True], 3)
        ),
    ],
)
def test_wrong_files(source: Tensors, tmp_path: Path, content: str, told: str) -> None:
    (tmp_path / "kept.json").write_text(content)
    with pytest.raises(UsageError, match=told):
        read_kept(tmp_path / "kept.json", source, 2)
