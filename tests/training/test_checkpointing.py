"""What stops a run, and what it leaves behind, inside two forked ranks."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny_run import Start, files_under, metrics, run_starts, tiny_config, train_losses


@pytest.fixture(scope="module")
def outcomes(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[Any]]]:
    """One run of three steps, then starts that must fail. Returns (folder, per start the result of each rank)."""
    folder = tmp_path_factory.mktemp("outcomes")
    first = tiny_config(tiny_corpus, folder / "first", "training.num_steps=3", "checkpoint.every_steps=1")
    run_starts([Start(first)])
    for name in ("damaged", "missing", "truncated"):
        shutil.copytree(folder / "first", folder / name)
    checkpoint = "checkpoints/step_00000003"
    # Both chunks are odd-numbered: rank 1 owns them, and all ranks must hear of it.
    damaged = folder / "damaged" / checkpoint / "tables.zarr/exp_avg/c.1.0"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    (folder / "missing" / checkpoint / "tables.zarr/weight/c.3.0").unlink()
    for file in (folder / "truncated" / checkpoint / "backbone").glob("*.distcp"):
        file.write_bytes(file.read_bytes()[:100])
    overrides = ["training.num_steps=3", "checkpoint.every_steps=1"]
    init_from = f"checkpoint.init_from={folder / 'missing' / checkpoint}"
    starts = {
        "damaged": Start(tiny_config(tiny_corpus, folder / "damaged", *overrides), resume=True),
        "missing": Start(tiny_config(tiny_corpus, folder / "new", init_from)),
        "truncated": Start(tiny_config(tiny_corpus, folder / "truncated", *overrides), resume=True),
        "diverged": Start(
            tiny_config(tiny_corpus, folder / "diverged", "optimizer.learning_rate=1e30", "checkpoint.every_steps=1")
        ),
        "half": Start(tiny_config(tiny_corpus, folder / "full"), stop_after=3),
        # Metrics are smaller than this limit, a backbone's file is larger.
        "full": Start(tiny_config(tiny_corpus, folder / "full"), resume=True, max_file_bytes=50_000),
        "infinite": Start(tiny_config(tiny_corpus, folder / "infinite", "model.init_std=1e400")),
    }
    before = files_under(folder / "damaged")
    by_rank = run_starts(list(starts.values()))
    assert files_under(folder / "damaged") == before, "a checkpoint that cannot be read must leave its run as it is"
    return folder, {name: [results[i] for results in by_rank] for i, name in enumerate(starts)}


@pytest.mark.parametrize(("name", "chunk"), [("damaged", "exp_avg/c.1.0"), ("missing", "weight/c.3.0")])
def test_bad_chunk_is_named_on_every_rank(outcomes: tuple[Path, dict[str, list[Any]]], name: str, chunk: str) -> None:
    first, second = outcomes[1][name]
    assert first == second
    kind, message = first
    assert kind == "UsageError"
    assert chunk in message
    assert name in message


def test_damaged_backbone_is_told_in_one_line(outcomes: tuple[Path, dict[str, list[Any]]]) -> None:
    for kind, message in outcomes[1]["truncated"]:
        assert kind == "UsageError"
        assert re.search(r"backbone/__._0\.distcp has 100 bytes, not the \d+ that were written", message)
        assert "\n" not in message


def test_start_from_a_bad_checkpoint_makes_no_run_folder(outcomes: tuple[Path, dict[str, list[Any]]]) -> None:
    assert not (outcomes[0] / "new").exists()


@pytest.mark.parametrize("name", ["diverged", "infinite"])
def test_non_finite_loss_stops_all_ranks_with_the_step(outcomes: tuple[Path, dict[str, list[Any]]], name: str) -> None:
    folder, results = outcomes
    first, second = results[name]
    assert first == second
    kind, message = first
    assert kind == "NonFiniteLossError"
    done = len(train_losses(folder / name))
    assert f"in step {done + 1}; the optimizer has not moved" in message


def test_last_checkpoint_stands_after_a_non_finite_loss(outcomes: tuple[Path, dict[str, list[Any]]]) -> None:
    folder = outcomes[0] / "diverged"
    done = max(train_losses(folder))
    assert (folder / f"checkpoints/step_{done:08d}/COMPLETE").exists()
    assert not (folder / f"checkpoints/step_{done + 1:08d}").exists()
    assert all(line["step"] <= done for line in metrics(folder))


def test_full_disk_is_told_with_the_folder_and_leaves_the_last_checkpoint(
    outcomes: tuple[Path, dict[str, list[Any]]],
) -> None:
    folder, results = outcomes
    checkpoints = folder / "full/checkpoints"
    for kind, message in results["full"]:
        assert kind == "SaveError"
        assert f"checkpoint {checkpoints}/step_00000004 could not be written" in message
        assert "GiB are free there" in message
        assert "\n" not in message
    assert [path.parent.name for path in sorted(checkpoints.glob("*/COMPLETE"))] == ["step_00000002", "step_00000003"]
