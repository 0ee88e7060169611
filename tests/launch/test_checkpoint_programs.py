"""Inspect, compare, verify and resume as a user calls them: what is printed, and the exit codes."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from types import ModuleType

import pytest
from tiny_run import TINY, Start, run_starts, tiny_config
from train_program import ROOT, train_module
from whole_checkpoint import flip_a_byte

from engram_megatron.benchmarks.noise_checkpoint import write_noise


def run(name: str, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """launch/NAME.py in this process."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"launch/{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr("sys.argv", [name, *map(str, arguments)])
    code: int = module.main()
    return code


def test_programs_tell_and_answer_by_their_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    a, b = (write_noise(run_dir / f"checkpoints/step_0000000{step}", 4, 5_000, step) for step in (6, 7))
    assert run("inspect_checkpoint", monkeypatch, run_dir) == 0
    assert capsys.readouterr().out.count("complete, ") == 2
    assert run("inspect_checkpoint", monkeypatch, a, "--json", "--health") == 0
    assert json.loads(capsys.readouterr().out)["step"] == 6
    assert run("compare_checkpoints", monkeypatch, a, a) == 0
    assert run("compare_checkpoints", monkeypatch, a, b) == 1
    assert "different  step: 6 and 7" in capsys.readouterr().out
    assert run("verify_checkpoint", monkeypatch, run_dir) == 0
    flip_a_byte(b / "tables.zarr/weight/c.0.0")
    assert run("verify_checkpoint", monkeypatch, run_dir, "--set-aside") == 1
    out = capsys.readouterr().out
    assert f"whole       {a}" in out
    assert f"damaged     {b}/tables.zarr/weight/c.0.0 is damaged: its CRC-32C is" in out
    assert f"set aside   {b}: --resume takes the one before" in out
    assert run("verify_checkpoint", monkeypatch, run_dir) == 0  # what does not count does no harm
    assert run("verify_checkpoint", monkeypatch, b) == 1
    assert run("compare_checkpoints", monkeypatch, a, tmp_path) == 2
    assert "is no checkpoint" in capsys.readouterr().err


@pytest.mark.slow
def test_resume_takes_the_one_before_a_damaged_checkpoint_only_when_told_to(
    tiny_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(tiny_corpus, tmp_path / "run", "training.num_steps=4")
    run_starts([Start(config)])
    checkpoints = tmp_path / "run/checkpoints"
    whole = shutil.copytree(checkpoints, tmp_path / "whole")
    monkeypatch.delenv("RANK", raising=False)
    started: list[list[str]] = []
    monkeypatch.setattr(
        "engram_megatron.training.launch_ranks.launch_ranks", lambda command, _ranks: started.append(command) or 0
    )
    options = [*TINY, "training.num_steps=4", f"data.corpus={tiny_corpus}", f"run_dir={tmp_path / 'run'}"]

    def start(*flags: str) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["launch/train.py", "engram_tiny", "--nproc-per-node=2", *options, *flags])
        code = train_module().main()
        told = capsys.readouterr()
        return code, told.out + told.err

    assert start("--resume", "--set-aside-damaged") == (0, "")
    assert "--set-aside-damaged" not in started[0]
    # Before the ranks start, and in the ranks.
    for file in ("train_state.json", "backbone/__0_0.distcp"):
        shutil.rmtree(checkpoints)
        shutil.copytree(whole, checkpoints)
        flip_a_byte(checkpoints / "step_00000004" / file)
        if file == "train_state.json":
            code, told = start("--resume")
            assert (code, told.count("\n")) == (2, 1)
        else:
            told = run_starts([Start(config, resume=True)])[0][0][1]
        assert f"{file} is damaged" in told
        assert "--resume --set-aside-damaged takes the one before" in told
        assert (checkpoints / "step_00000004/COMPLETE").exists()
        code, told = start("--resume", "--set-aside-damaged")
        assert (code, told.count("\n")) == (0, 1)
        assert f"step_00000004 is set aside as damaged: {checkpoints}/step_00000004/{file} is damaged" in told
        assert not (checkpoints / "step_00000004/COMPLETE").exists()
    summary = run_starts([Start(config, resume=True)])[0][0]
    assert summary.step == 4
    assert (checkpoints / "step_00000004/COMPLETE").exists()
    assert not (checkpoints / "step_00000004/DAMAGED").exists()
    assert start("--set-aside-damaged")[0] == 2
    monkeypatch.setenv("RANK", "0")
    code, told = start("--resume", "--set-aside-damaged")
    assert code == 2
    assert "run launch/verify_checkpoint.py RUN_DIR --set-aside first" in told
