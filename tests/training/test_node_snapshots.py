"""Saves to the nodes' own disks: a run that lost its last checkpoints, and a node, goes on as if it had not.

Ranks stand for nodes (`tables.ranks_per_node=1`); they share a disk, so what a node loses is removed by its name.
"""

from __future__ import annotations

import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_disk import small_disk
from tiny_run import Start, backbone, run_starts, tables, tiny_config, train_losses

RUN = ("training.num_steps=8", "checkpoint.every_steps=4", "tables.ranks_per_node=1")
NODES = 2
SAVED = "checkpoints/step_00000007"  # what a resume makes of the newest local save


def _config(corpus: Path, folder: Path, *options: str) -> Any:
    local = (f"checkpoint.local_dir={folder}/local", "checkpoint.local_every_steps=1")
    return tiny_config(corpus, folder / "run", *RUN, *local, *options)


@pytest.fixture(scope="module")
def broken_off(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run, killed in its eighth step: checkpoint 4, and on the disks of two nodes saves 6 and 7."""
    folder = tmp_path_factory.mktemp("nodes")
    run_starts([Start(_config(tiny_corpus, folder, "checkpoint.asynchronous=false"), stop_after=8)])
    shutil.rmtree(folder / "run/checkpoints/step_00000008")
    return folder


@pytest.fixture(scope="module")
def unbroken(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last checkpoint of the same run without all that."""
    folder = tmp_path_factory.mktemp("unbroken")
    run_starts([Start(tiny_config(tiny_corpus, folder, *RUN))])
    return folder / "checkpoints/step_00000008"


@pytest.fixture
def run(broken_off: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of it, which the test may damage, at the place of the first one: the place is part of a run's name."""
    kept = tmp_path / "kept"
    shutil.copytree(broken_off, kept)
    yield broken_off
    shutil.rmtree(broken_off)
    shutil.copytree(kept, broken_off)


def _save(folder: Path, step: int) -> Path:
    (found,) = folder.glob(f"local/*/step_{step:08d}-*")
    return found


def _resume(corpus: Path, folder: Path, *options: str, ranks: int = NODES) -> str:
    """Continue to the end; what was printed."""
    output = folder / "output.txt"
    outcomes = run_starts([Start(_config(corpus, folder, *options), resume=True, output=output)], ranks)
    assert [getattr(outcome, "step", outcome) for (outcome,) in outcomes] == [8] * ranks
    return output.read_text()


def _assert_equal(checkpoint: Path, expected: Path) -> None:
    for name, values in tables(expected).items():
        np.testing.assert_array_equal(tables(checkpoint)[name], values, err_msg=name)
    weights, found = backbone(expected), backbone(checkpoint)
    assert [name for name, tensor in weights.items() if not torch.equal(found[name], tensor)] == []


def test_two_saves_are_kept_each_node_with_its_part_and_its_neighbours(broken_off: Path) -> None:
    parts = ["node_000_of_002", "node_000_of_002.copy", "node_001_of_002", "node_001_of_002.copy"]
    saves = sorted(path.name.split("-")[0] for path in broken_off.glob("local/*/step_*"))
    assert saves == ["step_00000006", "step_00000007"]
    for step in (6, 7):
        assert sorted(path.name for path in _save(broken_off, step).iterdir()) == parts
        for part in parts[::2]:
            copy = _save(broken_off, step) / f"{part}.copy"
            files = sorted(path for path in copy.rglob("*") if path.is_file())
            assert len(files) > 5
            for path in files:
                assert path.read_bytes() == (_save(broken_off, step) / part / path.relative_to(copy)).read_bytes()


def test_resume_goes_on_from_the_nodes_disks(tiny_corpus: Path, run: Path, unbroken: Path) -> None:
    output = _resume(tiny_corpus, run)
    assert f"made {run}/run/{SAVED} of what the nodes' disks hold" in output
    assert "the copy on" not in output
    _assert_equal(run / "run/checkpoints/step_00000008", unbroken)
    assert sorted(train_losses(run / "run")) == list(range(1, 9))
    assert not list((run / "local").iterdir()), "a run that has ended leaves nothing on the nodes' disks"


def test_lost_node_is_replaced_by_its_neighbours_copy(tiny_corpus: Path, run: Path, unbroken: Path) -> None:
    for step in (6, 7):  # node 0 comes back with an empty disk
        shutil.rmtree(_save(run, step) / "node_000_of_002")
        shutil.rmtree(_save(run, step) / "node_001_of_002.copy")
    output = _resume(tiny_corpus, run)
    assert f"snapshot {_save_name(output, 7)}: the copy on " in output
    assert "stands for the part of node 0" in output
    _assert_equal(run / "run/checkpoints/step_00000008", unbroken)


def _save_name(output: str, step: int) -> str:
    return next(word.rstrip(":") for word in output.split() if word.startswith(f"step_{step:08d}-"))


@pytest.mark.parametrize("file", ["tables.zarr/weight/c.1.0", "manifest.json", "backbone/__1_0.distcp"])
def test_damaged_part_is_told_and_replaced_by_its_copy(tiny_corpus: Path, run: Path, unbroken: Path, file: str) -> None:
    holders = [path for path in sorted(_save(run, 7).glob("*_002")) if (path / file).exists()]
    for part in holders:
        content = bytearray((part / file).read_bytes())
        content[len(content) // 2] ^= 1
        (part / file).write_bytes(content)
    output = _resume(tiny_corpus, run)
    for part in holders:
        assert f"{part / file} is damaged" in output
        assert f"the copy on {socket.gethostname()} stands for the part of node {int(part.name[5:8])}" in output
    _assert_equal(run / "run/checkpoints/step_00000008", unbroken)


def test_save_without_a_whole_part_of_each_node_is_passed_over_for_an_older_one(
    tiny_corpus: Path, run: Path, unbroken: Path
) -> None:
    for part in _save(run, 7).glob("node_001*"):
        (part / "COMPLETE").unlink()
    output = _resume(tiny_corpus, run)
    assert "cannot be used: no whole part of node 1 is on any node" in output
    assert f"made {run}/run/checkpoints/step_00000006 of" in output
    _assert_equal(run / "run/checkpoints/step_00000008", unbroken)


def test_without_a_usable_save_the_newest_checkpoint_is_taken(tiny_corpus: Path, run: Path, unbroken: Path) -> None:
    for path in run.glob("local/*/step_*/node_000*"):
        shutil.rmtree(path)
    output = _resume(tiny_corpus, run)
    assert output.count("cannot be used: no whole part of node 0 is on any node") == 2
    assert "no whole snapshot on the nodes' disks is newer than the newest checkpoint" in output
    assert not (run / "run" / SAVED).exists()
    _assert_equal(run / "run/checkpoints/step_00000008", unbroken)


def test_any_number_of_ranks_reads_it(tiny_corpus: Path, run: Path, unbroken: Path) -> None:
    output = _resume(tiny_corpus, run, "parallel.expert=1", ranks=1)
    assert f"made {run}/run/{SAVED} of what the nodes' disks hold" in output
    assert tables(run / "run/checkpoints/step_00000008")["step_count"] == 8


def test_another_run_in_its_place_does_not_see_them(tiny_corpus: Path, run: Path) -> None:
    shutil.rmtree(run / "run")
    config = _config(tiny_corpus, run)
    again = Start(config, resume=True, stop_after=0, output=run / "output.txt")
    for outcomes in run_starts([Start(config, stop_after=2), again]):
        assert [outcome.step for outcome in outcomes] == [2, 2]
    assert "made " not in (run / "output.txt").read_text()


def test_disk_of_a_node_that_is_full_does_not_end_the_run(tiny_corpus: Path, tmp_path: Path, unbroken: Path) -> None:
    with small_disk(tmp_path / "local", "1m"):
        config = _config(tiny_corpus, tmp_path, "checkpoint.asynchronous=false")
        outcomes = run_starts([Start(config, output=tmp_path / "output.txt")])
    assert [getattr(outcome, "step", outcome) for (outcome,) in outcomes] == [8, 8]
    warnings = [line for line in (tmp_path / "output.txt").read_text().splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 6, "steps 1-3 and 5-7"
    for line in warnings:
        assert "on the disks of 2 nodes could not be written (node " in line
        assert "0.00 GiB are free there); training goes on, no such snapshot is there" in line
    _assert_equal(tmp_path / "run/checkpoints/step_00000008", unbroken)


def test_run_folder_that_cannot_take_it_is_told_and_nothing_is_lost(tiny_corpus: Path, run: Path) -> None:
    (run / "run" / SAVED).write_text("in its place")
    outcomes = run_starts([Start(_config(tiny_corpus, run), resume=True)])
    for ((kind, message),) in outcomes:
        assert kind == "UsageError"
        assert "the newest snapshot on the nodes' disks cannot be made checkpoint" in message
    assert len(list(run.glob("local/*/step_*"))) == 2
