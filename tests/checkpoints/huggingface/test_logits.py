"""An exported model gives Megatron's logits, for every variant of it, whole and piece by piece through its cache."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_case import END, checkpoint, documents, export, load_model, save_variants, write_tokenizer
from ranks import run_ranks

pytestmark = pytest.mark.slow  # transformers alone takes seconds to import

VARIANTS: dict[str, tuple[str, ...]] = {
    "all": (),
    "no_compression": ("engram.compression=false",),
    "no_conv": ("engram.conv=false",),
    "no_gate": ("engram.gate=false",),
    "bias": ("engram.bias=true",),
    "one_branch": ("engram.multi_branch=false",),
    "one_stream": ("model.mhc.num_streams=1",),
    "four_grams": ("engram.max_ngram_order=4", "engram.memory_dim=24", "engram.conv_kernel_size=3"),
    "one_text": ("engram.cut_at_documents=false", "data.separate_documents=false"),
    "memory_alone_cut": ("data.separate_documents=false",),
    "dense": ("model.moe=none",),
    "yarn": (
        "model.attention.rope=yarn",
        "model.attention.yarn_original_length=8",
        "model.attention.query_lora_rank=12",
    ),
    "mtp": ("model.mtp.num_layers=1",),
    "plain": ("engram=none", "model.mhc.num_streams=1"),
}
# Float32 rounds to 6e-8; sums of 1e2 terms through three layers, and a gate's root with a slope of up to
# 0.5 / sqrt(score), leave 1e-6.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("variants")
    write_tokenizer(folder / "tokenizer.json")
    return folder


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, Any]:
    return run_ranks(save_variants, 1, folder, folder / "tokenizer.json", VARIANTS, timeout_s=400)[0]


@pytest.fixture(scope="module")
def model_of(folder: Path, expected: dict[str, Any]) -> Any:
    @cache
    def load(name: str) -> Any:
        out = export(checkpoint(folder, name), folder / name / "exported", folder / "tokenizer.json")
        return load_model(out)

    return load


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_equal_megatrons(name: str, model_of: Any, expected: dict[str, Any]) -> None:
    with torch.no_grad():
        logits = model_of(name)(torch.from_numpy(documents().tokens)).logits.numpy()
    scale = np.abs(expected[name]).max()
    assert np.abs(logits - expected[name]).max() < TOLERANCE * scale


@pytest.mark.parametrize("name", VARIANTS)
def test_cache_gives_the_logits_of_the_whole_sequence(name: str, model_of: Any) -> None:
    """In pieces shorter and longer than the reach of n-grams and convolution, behind padding."""
    model, tokens = model_of(name), torch.from_numpy(documents().tokens)
    padded = torch.nn.functional.pad(tokens, (3, 0), value=END)
    mask = torch.ones_like(padded)
    mask[:, :3] = 0
    with torch.no_grad():
        whole = model(tokens, use_cache=False).logits
        cache, pieces = None, []
        for start, stop in ((0, 5), (5, 6), (6, 7), (7, 18), (18, 19), (19, padded.shape[1])):
            out = model(padded[:, start:stop], attention_mask=mask[:, :stop], cache=cache, use_cache=True)
            cache = out.cache
            pieces.append(out.logits)
    difference = (torch.cat(pieces, dim=1)[:, 3:] - whole).abs().max()
    assert difference < TOLERANCE * whole.abs().max()


def test_loss_is_that_of_the_next_tokens(model_of: Any) -> None:
    model, tokens = model_of("all"), torch.from_numpy(documents().tokens)
    with torch.no_grad():
        out = model(tokens, labels=tokens)
    expected = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_refuses_caches_that_it_would_misread(model_of: Any) -> None:
    from transformers import StaticCache

    model, tokens = model_of("all"), torch.from_numpy(documents().tokens)
    with pytest.raises(ValueError, match="not StaticCache"):
        model(tokens, cache=StaticCache(config=model.config, max_cache_len=30))
    with pytest.raises(ValueError, match="passed as `cache`"):
        model(tokens, past_key_values=1)


def test_generates_the_same_with_and_without_a_cache(model_of: Any) -> None:
    model, tokens = model_of("all"), torch.from_numpy(documents().tokens[:, :9])
    for options in ({}, {"num_beams": 3}):
        settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": END, **options}
        ours, again = (model.generate(tokens, use_cache=use, **settings) for use in (True, False))
        assert ours.shape == (len(tokens), 21)
        assert torch.equal(ours, again), options


def test_generates_from_text(folder: Path, model_of: Any) -> None:
    from transformers import AutoTokenizer

    model = model_of("all")
    tokenizer = AutoTokenizer.from_pretrained(folder / "all/exported", trust_remote_code=True)
    batch = tokenizer(["a5", "a9"], return_tensors="pt", padding=True)
    assert tokenizer.batch_decode(model.generate(**batch, max_new_tokens=4))[0].startswith("a5")


def test_bfloat16_keeps_mappings_and_router_bias_in_float32(folder: Path, model_of: Any, expected: Any) -> None:
    out = export(checkpoint(folder, "all"), folder / "narrow", folder / "tokenizer.json", dtype="bfloat16")
    narrow, wide = load_model(out, dtype="auto"), model_of("all")
    for name, parameter in narrow.state_dict().items():
        exact = wide.state_dict()[name]
        kept = ".hc_" in name or name.endswith(("e_score_correction_bias", "token_map"))
        assert parameter.dtype == (exact.dtype if kept else torch.bfloat16), name
        assert torch.equal(parameter, exact.to(parameter.dtype)), name
    with torch.no_grad():
        logits = narrow(torch.from_numpy(documents().tokens)).logits.float().numpy()
    assert np.abs(logits - expected["all"]).mean() < 0.05 * np.abs(expected["all"]).max()
