"""`key=value` overrides: what they set, what they refuse, and that a config survives text and JSON."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from engram_megatron.config import RunConfig
from engram_megatron.errors import UsageError
from engram_megatron.model.budget import moe_twin
from engram_megatron.overrides import (
    apply_overrides,
    from_dict,
    leaves,
    overrides_between,
    to_dict,
    with_absolute_paths,
)
from engram_megatron.presets import engram_tiny, preset, preset_names


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("training.num_steps=7", 7),
        ("optimizer.learning_rate=3", 3.0),
        ("optimizer.learning_rate=1e-4", 1e-4),
        ("engram.layer_numbers=2,4", (2, 4)),
        ("engram.layer_numbers=(3,)", (3,)),
        ("model.attention.query_lora_rank=16", 16),
        ("model.attention.query_lora_rank=none", None),
        ("engram.conv=False", False),
        ("model.moe=none", None),
        ("data.corpus=a=b", "a=b"),
    ],
)
def test_override_sets_the_value_in_the_type_of_the_field(override: str, value: object) -> None:
    found: object = apply_overrides(engram_tiny(), [override])
    for part in override.partition("=")[0].split("."):
        found = getattr(found, part)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("engram.rows_per_hed=3", "did you mean 'engram.rows_per_head'"),
        ("model.num_experts=3", "did you mean 'model.moe.num_experts'"),
        ("training.num_steps=1.5", "must be of type int"),
        ("training.num_steps=True", "must be of type int"),
        ("training.dtype=fp8", "must be one of bfloat16, float32, float64"),
        ("engram.conv=1", "must be true or false"),
        ("optimizer.muon_ns_coefficients=1,2", "must have 3 items"),
        ("engram=3", "engram is a group"),
        ("model=none", "model is a group"),
        ("training.num_steps.x=3", "unknown key"),
        ("training.num_steps", "not of the form key=value"),
    ],
)
def test_wrong_override_is_refused_with_what_to_write(override: str, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        apply_overrides(engram_tiny(), [override])


def test_field_of_a_part_that_is_off_cannot_be_set() -> None:
    with pytest.raises(UsageError, match=r"cannot set engram\.conv: engram is none"):
        apply_overrides(engram_tiny(), ["engram=none", "engram.conv=true"])


@pytest.mark.parametrize("name", preset_names())
def test_presets_are_valid_and_survive_json(name: str) -> None:
    config = preset(name)
    config.validate()
    assert from_dict(RunConfig, json.loads(json.dumps(to_dict(config)))) == config


def test_overrides_between_two_configs_turn_one_into_the_other() -> None:
    pair = moe_twin(engram_tiny())
    for target in (pair.moe, replace(pair.engram, run_dir="x"), engram_tiny()):
        found = apply_overrides(engram_tiny(), overrides_between(engram_tiny(), target))
        assert replace(found, name=target.name) == target


def test_paths_are_made_absolute_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    relative = ["run_dir=r", "data.corpus=c", "checkpoint.local_dir=/disk", "tables.nvme_dir=", "engram=none"]
    assert with_absolute_paths(engram_tiny(), relative) == [
        *(f"run_dir={tmp_path}/r", f"data.corpus={tmp_path}/c", "checkpoint.local_dir=/disk"),
        *("tables.nvme_dir=", "engram=none"),
    ]
    paths = {key for key, _, field in leaves(engram_tiny()) if key.endswith(("_dir", "corpus", "tokenizer", "_from"))}
    marked = {key for key, _, field in leaves(engram_tiny()) if field.metadata.get("kind") == "path"}
    assert paths == marked
