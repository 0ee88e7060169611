"""What may change at a resume, which checkpoints exist, and who may write to a run folder."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engram_checkpoints.checkpoint_files import COMPLETE
from engram_megatron.config import CheckpointConfig, RunConfig
from engram_megatron.config_fields import RESUME_FREE
from engram_megatron.errors import UsageError
from engram_megatron.overrides import leaves, to_dict
from engram_megatron.presets import engram_tiny
from engram_megatron.training.run_folder import RunFolder, check_resumable

LEAVES = {key: (value, field) for key, value, field in leaves(engram_tiny())}
FREE = [key for key, (_, field) in LEAVES.items() if field.metadata.items() >= RESUME_FREE.items()]
FIXED = [key for key in LEAVES if key not in FREE]
PAGE = Path(__file__).parents[2] / "docs/resume.md"


def other(value: Any) -> Any:
    """Another value of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, tuple):
        return (*value[:-1], other(value[-1])) if value else ("other",)
    return "other" if value is None else f"{value}_other"


def with_value(config: Any, path: list[str], change: Callable[[Any], Any]) -> Any:
    name, *rest = path
    value = getattr(config, name)
    return dataclasses.replace(config, **{name: with_value(value, rest, change) if rest else change(value)})


def saved(config: RunConfig) -> dict[str, Any]:
    """As a checkpoint has it."""
    stored: dict[str, Any] = json.loads(json.dumps(to_dict(config)))
    return stored


def test_same_config_may_resume() -> None:
    check_resumable(saved(engram_tiny()), engram_tiny())


@pytest.mark.parametrize("key", FREE)
def test_free_key_may_change(key: str) -> None:
    changed = with_value(engram_tiny(), key.split("."), other)
    assert changed != engram_tiny()
    check_resumable(saved(engram_tiny()), changed)


def test_nothing_of_the_layout_is_fixed() -> None:
    assert not [key for key in FIXED if key.startswith("parallel.")]
    assert {"tables.block_rows", "training.micro_batch_size"} <= set(FREE)


@pytest.mark.parametrize("key", FIXED)
def test_any_other_key_is_refused_with_both_values(key: str) -> None:
    value = LEAVES[key][0]
    changed = with_value(engram_tiny(), key.split("."), other)
    with pytest.raises(UsageError) as refused:
        check_resumable(saved(engram_tiny()), changed)
    as_json, now = (list(v) if isinstance(v, tuple) else v for v in (value, other(value)))
    assert f"cannot resume with {key} = {now!r}: the checkpoint was made with {as_json!r}" in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("key", ["engram", "model.moe"])
def test_optional_part_cannot_be_switched_off_or_on(key: str) -> None:
    without = with_value(engram_tiny(), key.split("."), lambda _: None)
    with pytest.raises(UsageError, match=rf"cannot resume with {key} = None: the checkpoint was made with {key} set"):
        check_resumable(saved(engram_tiny()), without)
    with pytest.raises(UsageError, match=rf"cannot resume with {key}\..*: the checkpoint was made with None"):
        check_resumable(saved(without), engram_tiny())


def test_page_lists_exactly_the_free_keys() -> None:
    assert re.findall(r"^- `([\w.]+)`", PAGE.read_text(), flags=re.MULTILINE) == FREE


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


def make_checkpoint(folder: RunFolder, step: int, *, complete: bool = True) -> None:
    path = folder.checkpoint(step)
    path.mkdir(parents=True)
    (path / "data").touch()
    if complete:
        (path / COMPLETE).touch()


def steps(folder: RunFolder) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in folder.checkpoints.iterdir())


def test_incomplete_checkpoint_does_not_count(folder: RunFolder) -> None:
    for step in (2, 10, 100):
        make_checkpoint(folder, step, complete=step != 100)
    assert folder.complete_checkpoints() == [folder.checkpoint(2), folder.checkpoint(10)]


@pytest.mark.parametrize(
    ("keep_last", "keep_every_steps", "left"),
    [
        (1, 0, [8, 10]),
        (2, 0, [4, 8, 10]),
        (9, 0, [2, 4, 8, 10]),
        (0, 0, [2, 4, 8, 10]),
        (1, 3, [8, 10]),
        (1, 4, [4, 8, 10]),
    ],
)
def test_which_checkpoints_are_kept(folder: RunFolder, keep_last: int, keep_every_steps: int, left: list[int]) -> None:
    # 6 was left half-written by a killed run and can never be continued; 10 is newer than all that is complete.
    for step in (2, 4, 6, 8, 10):
        make_checkpoint(folder, step, complete=step not in (6, 10))
    folder.remove_old_checkpoints(CheckpointConfig(keep_last=keep_last, keep_every_steps=keep_every_steps))
    assert steps(folder) == left


def test_claim_holds_the_folder_against_others_but_not_for_readers(folder: RunFolder) -> None:
    folder.check_unused()
    folder.claim(engram_tiny())
    assert json.loads(folder.config_file.read_text()) == saved(engram_tiny())
    with pytest.raises(UsageError, match="in use by a running job"):
        RunFolder(folder.path).check_unlocked()
    with pytest.raises(UsageError, match="in use by a running job"):
        RunFolder(folder.path).claim(engram_tiny())
    with pytest.raises(UsageError, match="already holds a run; continue it with --resume"):
        RunFolder(folder.path).check_unused()


def test_ranks_that_check_the_lock_together_do_not_take_each_other_for_a_job(folder: RunFolder) -> None:
    folder.path.mkdir()
    lock = folder.path / ".lock"
    lock.touch()
    with lock.open() as another_rank:
        fcntl.flock(another_rank, fcntl.LOCK_SH)  # what `check_unlocked` holds for a moment
        folder.check_unlocked()


def test_start_that_was_cut_short_can_be_repeated(folder: RunFolder) -> None:
    for path in (folder.path, folder.tensorboard, folder.checkpoints):
        path.mkdir()
    for name in (".lock", "events.jsonl"):
        (folder.path / name).touch()
    for name in ("job", "logs", "heartbeats"):  # of a submitted job
        (folder.path / name).mkdir()
    folder.check_unused()
    folder.check_is_run_or_empty()
    folder.check_unlocked()


def test_folder_below_a_file_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="is not a folder"):
        RunFolder(tmp_path / "file/run").check_writable()


def test_folder_without_permission_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda _path, _mode: False)  # root may write everywhere
    with pytest.raises(UsageError, match=f"no permission in {re.escape(str(tmp_path))}"):
        RunFolder(tmp_path / "deep/run").check_writable()


def test_checkpoint_from_before_a_field_existed_counts_as_its_default() -> None:
    older = saved(engram_tiny())
    del older["model"]["mtp"], older["data"]["separate_documents"]
    check_resumable(older, engram_tiny())
    with pytest.raises(UsageError, match=r"data\.separate_documents = False: the checkpoint was made with True;"):
        check_resumable(older, with_value(engram_tiny(), ["data", "separate_documents"], lambda _: False))
