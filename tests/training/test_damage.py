"""One flipped byte in any file of a checkpoint, a full disk and a read-only one: each is told in one line."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from small_disk import small_disk
from tiny_run import Start, files_under, run_starts, tiny_config

pytestmark = pytest.mark.slow  # fourteen starts

SAVED = "checkpoints/step_00000002"
FILES = (
    *("COMPLETE", "manifest.json", "train_state.json", "backbone/.metadata", "backbone/metadata.json"),
    *("backbone/__0_0.distcp", "backbone/__1_0.distcp", "tables.zarr/zarr.json", "tables.zarr/weight/zarr.json"),
    *("tables.zarr/weight/c.1.0", "tables.zarr/exp_avg/c.0.0", "tables.zarr/exp_avg_sq/c.2.0"),
    *("tables.zarr/last_step/c.1", "tables.zarr/learning_rates/c.0"),
)
RUN = ("training.num_steps=2", "checkpoint.every_steps=2", "optimizer.warmup_steps=1")


@pytest.fixture(scope="module")
def outcomes(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[Any]]]:
    """(folder, for each file the outcome of a resume on both ranks of a run in which a byte in its middle differs)."""
    folder = tmp_path_factory.mktemp("damage")
    run_starts([Start(tiny_config(tiny_corpus, folder / "whole", *RUN))])
    kinds = {path.relative_to(folder / "whole" / SAVED).suffix for path in (folder / "whole" / SAVED).rglob("c.*")}
    assert kinds, "tables were saved"
    starts = {}
    for number, file in enumerate(FILES):
        shutil.copytree(folder / "whole", folder / str(number))
        path = folder / str(number) / SAVED / file
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        starts[file] = Start(tiny_config(tiny_corpus, folder / str(number), *RUN), resume=True)
    before = files_under(folder)
    by_rank = run_starts(list(starts.values()))
    assert files_under(folder) == before, "nothing is written where a resume is refused"
    return folder, {file: [results[i] for results in by_rank] for i, file in enumerate(starts)}


@pytest.mark.parametrize("file", FILES)
def test_flipped_byte_is_told_in_one_line_that_names_the_file(
    outcomes: tuple[Path, dict[str, list[Any]]], file: str
) -> None:
    for kind, message in outcomes[1][file]:
        assert kind == "UsageError"
        named = "manifest.json" if file == "COMPLETE" else file.removeprefix("tables.zarr/")
        assert named in message
        assert "is damaged" in message
        assert "use another" in message
        assert "\n" not in message


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", "2m") as disk:
        yield disk


def test_full_and_read_only_disks_are_told_and_leave_nothing_that_counts(tiny_corpus: Path, disk: Path) -> None:
    config = tiny_config(tiny_corpus, disk / "run", *RUN, "engram.rows_per_head=4001")
    for kind, message in run_starts([Start(config)])[0]:
        assert kind == "SaveError"
        assert f"{SAVED} could not be written (" in message
        assert "No space left on device" in message
        assert "0.00 GiB are free there" in message
    assert not list(disk.rglob("COMPLETE"))
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    other = tiny_config(tiny_corpus, disk / "other", *RUN)
    for kind, message in run_starts([Start(other)])[0]:
        assert (kind, message) == (
            "UsageError",
            f"run_dir = {other.run_dir} cannot be written: no permission in {disk}",
        )
