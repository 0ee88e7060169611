"""Checkpoints that are written beside training, on two ranks, are those that are waited for, of the same training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_run import Start, metrics, run_starts, tiny_config, train_losses

# The writer takes longer than a step, which waits for it: of a rank's rows few have room for a copy.
FEW = "checkpoint.staging_bytes=10000"
TABLES = ("engram.rows_per_head=4001", "tables.block_rows=512", "checkpoint.keep_last=0")


@pytest.fixture(scope="module")
def runs(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    """The same six steps, saved after every second: waited for (`waited`), and beside training with room for copies of
    all rows (`beside`) and of few (`few`); with balanced momentum both ways. Returns (folder, summaries of rank 0)."""
    folder = tmp_path_factory.mktemp("runs")
    sinkhorn = "tables.update=sinkhorn"
    options = {
        "waited": ["checkpoint.asynchronous=false"],
        "beside": [],
        "few": [FEW],
        "sinkhorn_waited": [sinkhorn, "checkpoint.asynchronous=false"],
        "sinkhorn": [sinkhorn, FEW],
    }
    starts = [Start(tiny_config(tiny_corpus, folder / name, *TABLES, *more)) for name, more in options.items()]
    return folder, run_starts(starts)[0]


def _manifest(checkpoint: Path) -> dict[str, Any]:
    """Bytes and sum of every file but those that hold the configuration or a random id."""
    files = json.loads((checkpoint / "manifest.json").read_text())["files"]
    return {name: value for name, value in files.items() if name not in ("train_state.json", "backbone/.metadata")}


@pytest.mark.parametrize(("name", "waited"), [("beside", "waited"), ("few", "waited"), ("sinkhorn", "sinkhorn_waited")])
def test_files_and_losses_are_those_of_saves_that_are_waited_for(
    runs: tuple[Path, list[Any]], name: str, waited: str
) -> None:
    folder, _ = runs
    assert train_losses(folder / name) == train_losses(folder / waited)
    for step in (2, 4, 6):
        ours, theirs = (folder / which / f"checkpoints/step_{step:08d}" for which in (name, waited))
        assert _manifest(ours) == _manifest(theirs)
        assert (ours / "COMPLETE").is_file()
    assert len(_manifest(ours)) > 20


def test_seconds_and_stalls_of_every_save_are_logged(runs: tuple[Path, list[Any]]) -> None:
    folder, _ = runs
    for name in ("waited", "beside"):
        saves = {line["step"]: line for line in metrics(folder / name) if "checkpoint/seconds" in line}
        assert sorted(saves) == [2, 4, 6]
        for line in saves.values():
            # The rank that waited longest may have begun before rank 0, whose clock this is: by far less than a save.
            share = line["checkpoint/stall_ms"] / (line["checkpoint/seconds"] * 1e3)
            assert 0.8 < share < 1.25 if name == "waited" else 0 < share < 1.25
