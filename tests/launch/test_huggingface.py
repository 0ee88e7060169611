"""Mistakes with launch/export_hf.py and launch/import_hf.py cost one line and write nothing."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "launch"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export_hf.py", "nothing", "out"], "nothing is not a complete checkpoint"),
        (["export_hf.py", "nothing", "out", "--shard-gib", "0"], "--shard-gib 0.0 must be positive"),
        (["import_hf.py", "nothing", "out"], "nothing/config.json cannot be read"),
        (["import_hf.py", "nothing", "out", "engram_tin"], "unknown preset 'engram_tin'"),
    ],
)
def test_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(LAUNCH / arguments[0]), run_name="__main__")
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert not list(tmp_path.iterdir())
