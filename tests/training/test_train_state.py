"""The state of a checkpoint: written and read back, and refused where a resume would be another run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engram_checkpoints.checkpoint_files import FileSums, complete
from engram_checkpoints.train_state import TrainState
from engram_megatron.errors import UsageError
from engram_megatron.overrides import from_dict, to_dict
from engram_megatron.presets import engram_tiny
from engram_megatron.training.train_state import check_hash_identity, check_resume, check_tokenizer

STATE = TrainState(
    step=7,
    tokens_seen=1234,
    world_size=2,
    corpus_fingerprint="a" * 64,
    tokenizer_sha256="c" * 64,
    hash_identity={"hash_seed": 0},
    config=json.loads(json.dumps(to_dict(engram_tiny()))),
)


def write(folder: Path, state: TrainState = STATE) -> None:
    sums = FileSums(folder)
    state.write(folder, sums)
    complete(folder, sums.flush())


def test_read_gives_what_was_written(tmp_path: Path) -> None:
    write(tmp_path)
    state = TrainState.read(tmp_path)
    assert state == STATE
    assert from_dict(type(engram_tiny()), state.config) == engram_tiny()
    check_resume(state, engram_tiny(), "a" * 64)


def test_checkpoint_without_its_mark_does_not_exist(tmp_path: Path) -> None:
    STATE.write(tmp_path, FileSums(tmp_path))
    with pytest.raises(UsageError, match="not a complete checkpoint"):
        TrainState.read(tmp_path)


def test_state_of_another_format_is_refused(tmp_path: Path) -> None:
    write(tmp_path, replace(STATE, format=2))
    with pytest.raises(UsageError, match="has checkpoint format 2, this version reads format 1"):
        TrainState.read(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'{"step": 1}', b"\xff\xfe", b'{"unknown": 1}'])
def test_damaged_state_is_named_in_one_line(content: bytes, tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "train_state.json").write_bytes(content)
    with pytest.raises(UsageError, match=r"train_state\.json is damaged") as refused:
        TrainState.read(tmp_path)
    assert "\n" not in str(refused.value)


def test_another_corpus_is_refused_with_both_values() -> None:
    with pytest.raises(UsageError, match="bbbbbbbbbbbb, the checkpoint was trained on aaaaaaaaaaaa"):
        check_resume(STATE, engram_tiny(), "b" * 64)


@pytest.mark.parametrize(
    ("there", "here"), [(None, {"hash_seed": 0}), ({"hash_seed": 0}, None), ({"hash_seed": 0}, {"hash_seed": 1})]
)
def test_tables_of_another_hash_are_refused(there: dict[str, Any] | None, here: dict[str, Any] | None) -> None:
    with pytest.raises(UsageError, match="tables"):
        check_hash_identity(replace(STATE, hash_identity=there), here, Path("checkpoint"))


def test_weights_of_another_tokenizer_are_refused() -> None:
    check_tokenizer(STATE, "c" * 64, Path("checkpoint"))
    with pytest.raises(UsageError, match=r"another tokenizer \(sha256 cccccccccccc\).*dddddddddddd"):
        check_tokenizer(STATE, "d" * 64, Path("checkpoint"))
