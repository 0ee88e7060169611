"""Checkpoints that a rollback sets aside: whole, unseen by a resume, and what they are deltas of is kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engram_checkpoints.checkpoint_files import COMPLETE, MANIFEST, is_complete, sum_of
from engram_checkpoints.deltas import base_of, bases_of
from engram_checkpoints.rolled_back import rolled_back_checkpoints, rolled_back_folder, set_aside_in
from engram_checkpoints.run_checkpoints import complete_checkpoints
from engram_megatron.config import CheckpointConfig
from engram_megatron.training.run_folder import RunFolder

BASES = {10: None, 20: 10, 30: None, 40: 30}  # step 20 is a delta of step 10


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """Four checkpoints that hold no more than what they are deltas of."""
    folder = RunFolder(tmp_path)
    for step, base in BASES.items():
        tables = folder.checkpoint(step) / "tables.zarr"
        tables.mkdir(parents=True)
        of = None
        if base is not None:
            crc32c = sum_of(folder.checkpoint(base) / MANIFEST).crc32c
            of = {"checkpoint": folder.checkpoint(base).name, "step_count": base, "manifest_crc32c": crc32c}
        (tables / "zarr.json").write_text(json.dumps({"attributes": {"base": of}}))
        (folder.checkpoint(step) / MANIFEST).write_text(str(step))
        (folder.checkpoint(step) / COMPLETE).touch()
    return folder


def _steps(paths: list[Path]) -> list[int]:
    return [int(path.name.removeprefix("step_")) for path in paths]


@pytest.mark.parametrize("done_before_a_kill", range(4))
def test_all_are_moved_whole_after_a_kill_too(run: RunFolder, done_before_a_kill: int) -> None:
    folder = rolled_back_folder(run.path, 1)
    stale = complete_checkpoints(run.path)[:0:-1]
    if done_before_a_kill:
        folder.mkdir()
        (folder / "step_00000010").symlink_to("../step_00000010")
        for path in stale[:done_before_a_kill]:
            path.rename(folder / path.name)
    set_aside_in(folder, stale[done_before_a_kill:])
    assert _steps(complete_checkpoints(run.path)) == [10]
    moved = rolled_back_checkpoints(run.path)
    assert _steps(moved) == [10, 20, 30, 40], "the first is a link"
    for path in moved:
        assert is_complete(path)
        base = base_of(path)
        if base is not None:
            assert sum_of(path.parent / base.checkpoint / MANIFEST).crc32c == base.manifest_crc32c


def test_base_of_what_was_set_aside_is_kept(run: RunFolder) -> None:
    set_aside_in(rolled_back_folder(run.path, 1), complete_checkpoints(run.path)[:0:-1])
    for step in (11, 12):
        run.checkpoint(step).mkdir()
        (run.checkpoint(step) / COMPLETE).touch()
    run.remove_old_checkpoints(CheckpointConfig(keep_last=1))
    assert _steps(complete_checkpoints(run.path)) == [10, 12]
    assert all(is_complete(path) for path in bases_of(rolled_back_checkpoints(run.path)))


def test_nothing_is_made_where_nothing_is_to_be_moved(run: RunFolder) -> None:
    set_aside_in(rolled_back_folder(run.path, 1), [])
    assert _steps(complete_checkpoints(run.path)) == list(BASES)
    assert not rolled_back_folder(run.path, 1).exists()
