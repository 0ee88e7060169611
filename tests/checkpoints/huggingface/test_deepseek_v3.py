"""A mixture of experts of transformers' own DeepSeek-V3 gives the same logits in Megatron's model after an import, and
goes out again as it came in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_case import documents, export, logits_of, write_tokenizer
from ranks import run_ranks
from small_run import VOCAB, small_run_config

from engram_checkpoints.huggingface.import_folder import ImportSummary, import_folder
from engram_checkpoints.huggingface.safetensors_file import SafetensorsFolder
from engram_megatron.errors import UsageError

pytestmark = pytest.mark.slow  # transformers alone takes seconds to import

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 8,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 0.8,
}
MODELS: dict[str, dict[str, Any]] = {
    "plain": {"q_lora_rank": None},
    "compressed queries, yarn": {"q_lora_rank": 12, "rope_parameters": YARN, "n_shared_experts": 2},
    "weights of one type": {"q_lora_rank": None, "first_k_dense_replace": 0, "n_group": 2, "topk_group": 2},
}


def _write_model(folder: Path, fields: dict[str, Any]) -> Any:
    """A model with random weights, and its logits without documents."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    sizes = {
        **{"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16},
        **{"num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 2, "kv_lora_rank": 16},
        **{"qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 12, "n_routed_experts": 4},
        **{"num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1},
        **{"topk_group": 1, "num_mtp_layers": 0, "max_position_embeddings": 32, "routed_scaling_factor": 1.7},
    }
    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**{**sizes, **fields})).eval()
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.is_floating_point() and "inv_freq" not in name:
                tensor.copy_(torch.randn_like(tensor) * 0.2 + ("norm" in name))
        expected = model(torch.from_numpy(documents().tokens)).logits.numpy()
    model.save_pretrained(folder)
    write_tokenizer(folder / "tokenizer.json")
    return expected


def _import(folder: Path, target: Path) -> ImportSummary:
    base = small_run_config("float32", ["data.separate_documents=false"])
    return import_folder(folder, target, base, (), tokenizer=None)


def test_logits_equal_transformers_own_model(tmp_path: Path) -> None:
    expected = [_write_model(tmp_path / name, fields) for name, fields in MODELS.items()]
    targets = [tmp_path / f"{name} imported" for name in MODELS]
    for name, target in zip(MODELS, targets, strict=True):
        config = _import(tmp_path / name, target).config
        assert config.engram is None
        assert config.model.mhc.num_streams == 1
    tokenizer = tmp_path / "plain/tokenizer.json"
    ours_of_all = run_ranks(logits_of, 1, tokenizer, targets, documents())[0]
    for name, ours, theirs in zip(MODELS, ours_of_all, expected, strict=True):
        # float32, a few hundred operations in a row; the models differ in the order of sums only
        assert np.abs(ours - theirs).max() < 1e-5 * np.abs(theirs).max(), name


def test_goes_out_as_it_came_in(tmp_path: Path) -> None:
    """The same names and the same bits: another program that reads DeepSeek-V3 reads an export without Engram."""
    _write_model(tmp_path / "model", MODELS["compressed queries, yarn"])
    _import(tmp_path / "model", tmp_path / "imported")
    out = export(tmp_path / "imported", tmp_path / "out", tmp_path / "model/tokenizer.json")
    before, after = SafetensorsFolder(tmp_path / "model"), SafetensorsFolder(out)
    assert before.tensors == after.tensors
    for name in before.tensors:
        assert torch.equal(before.read(name), after.read(name)), name


def test_multi_token_prediction_is_left_out_and_said_so(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    _write_model(tmp_path / "model", MODELS["plain"])
    file = tmp_path / "model/model.safetensors"
    save_file(load_file(file) | {"model.layers.3.enorm.weight": torch.ones(32)}, file, {"format": "pt"})
    assert _import(tmp_path / "model", tmp_path / "imported").left_out == ["model.layers.3.enorm.weight"]
    path = tmp_path / "model/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rope_parameters": {"rope_type": "linear"}}))
    with pytest.raises(UsageError, match="rope_type linear"):
        _import(tmp_path / "model", tmp_path / "again")
