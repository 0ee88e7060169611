"""Pictures of TensorBoard show a run, or one line says why there are none."""

from __future__ import annotations

import shutil
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from torch.utils.tensorboard import SummaryWriter

from engram_megatron.errors import UsageError
from engram_megatron.jobs.screenshots import DASHBOARDS, page_of, screenshots


def log_curve(logdir: Path) -> Path:
    with SummaryWriter(str(logdir)) as board:
        for step in range(100):
            board.add_scalar("train/loss", 1 / (step + 1), step)
    return logdir


def test_curves_begin_with_the_loss() -> None:
    (cards,) = parse_qs(urlsplit(page_of("timeseries")).query)["pinnedCards"]
    assert cards.startswith('[{"plugin":"scalars","tag":"train/loss"}')
    assert page_of("text") == "#text"


def test_machine_without_browser_or_folder_without_runs_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda _: None)
    with pytest.raises(UsageError, match="chromium"):
        screenshots(log_curve(tmp_path / "run"), tmp_path / "out")
    monkeypatch.setattr("shutil.which", lambda _: "/bin/false")
    with pytest.raises(UsageError, match="holds nothing that TensorBoard could show"):
        screenshots(tmp_path / "nowhere", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_pictures_differ_with_what_they_show(tmp_path: Path) -> None:
    pictures = screenshots(log_curve(tmp_path / "run"), tmp_path / "out")
    assert [picture.name for picture in pictures] == [f"{name}.png" for name in DASHBOARDS]
    contents = [picture.read_bytes() for picture in pictures]
    assert all(content.startswith(b"\x89PNG") for content in contents)
    assert len(set(contents)) == len(contents)
